"""What else a run was made with: for people who look for the reason of a difference.

None of it decides whether two runs are the same; ``versions.py`` has what can change a result.
"""

from __future__ import annotations

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

GIT_TIMEOUT_S = 10.0
SMI = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def surroundings(source: Path | None) -> dict[str, Any]:
    """Packages, memory, GPU with driver and cuDNN, and the git commit of the experiment's code.

    Args:
        source: the file of the experiment; None where there is none.
    """
    found: dict[str, Any] = {
        "packages": _packages(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "git": None if source is None else git_state(source.parent),
    }
    return {**found, **_gpu()}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that a folder is in, and whether files differ from it.

    None where there is no repository, or no git.
    """
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "-C", str(folder), "status", "--porcelain")
    return {"commit": commit.strip(), "is_dirty": changed is None or bool(changed.strip())}


def _packages() -> dict[str, str]:
    """All installed distributions, by name."""
    found = {
        str(one.metadata["Name"]): one.version
        for one in metadata.distributions()
        if one.metadata["Name"]
    }
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output(*SMI)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "driver": None if driver is None else driver.splitlines()[0].strip(),
    }


def _output(*command: str) -> str | None:
    """What a program prints; None where it is not there, fails, or takes too long."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=GIT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
