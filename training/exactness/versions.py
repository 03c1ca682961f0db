"""What a run was made with: library versions and the device."""

from __future__ import annotations

import platform
from importlib import metadata

LIBRARIES = ("holdfast", "torch", "numpy", "safetensors")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a result.

    The instruction set that torch chose for the CPU counts as one: it changes the last bits.
    """
    import torch

    versions = {name: metadata.version(name) for name in LIBRARIES}
    versions["python"] = platform.python_version()
    versions["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


def device_name(kind: str) -> str:
    """``cpu`` with the processor's architecture, or the name of the GPU."""
    import torch

    return torch.cuda.get_device_name() if kind == "cuda" else f"cpu {platform.machine()}"
