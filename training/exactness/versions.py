"""What a run was made with: library versions and the device."""

from __future__ import annotations

import platform
from importlib import metadata

LIBRARIES = ("torch", "numpy", "safetensors")
SOURCE_TREE = "0+source-tree"


def holdfast_version() -> str:
    """Of the installed distribution; ``0+source-tree`` where the sources run uninstalled."""
    try:
        return metadata.version("holdfast")
    except metadata.PackageNotFoundError:
        return SOURCE_TREE


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a result.

    The instruction set that torch chose for the CPU counts as one: it changes the last bits.
    """
    import torch

    versions = {"holdfast": holdfast_version()}
    versions |= {name: metadata.version(name) for name in LIBRARIES}
    versions["python"] = platform.python_version()
    versions["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


def device_name(kind: str) -> str:
    """``cpu`` with the processor's architecture, or the name of the GPU."""
    import torch

    return torch.cuda.get_device_name() if kind == "cuda" else f"cpu {platform.machine()}"
