"""What has to be set for the same bytes to come out twice.

Two parts: the environment, which only a parent can set before the process starts, and torch's own
switches, which are set inside. The number of threads changes the order of sums and with it the
last bits, so a run keeps the number that its first segment used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

REQUIRED_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "OMP_DYNAMIC": "FALSE",
    "MKL_DYNAMIC": "FALSE",
}
SAFE_PATH = {"PYTHONSAFEPATH": "holdfast"}
"""For processes below which others start Python, as Prefect does its servers and engines: there,
too, the current folder is not searched. A process that runs a user's code takes ours out again, so
that the programs which that code starts find what lies beside them."""
FILLED_MEMORY = {"HOLDFAST_FILL_MEMORY": "1"}
"""For processes that look for what is not exact: fresh memory is filled with NaN there, so that
reading what nobody has written shows. Training does without: on a GPU it costs a tenth of a step.
"""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def python_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules, or of an installed package.

    With ``-P``: the folder in which somebody stands is not searched, so that no file of theirs,
    nor of a bundle that they look into, runs in the place of ours. Processes that multiprocessing
    starts from there inherit it.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(
    num_threads: int, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a process that trains, from that of its parent."""
    child = dict(os.environ if environment is None else environment)
    if child.items() >= SAFE_PATH.items():
        del child["PYTHONSAFEPATH"]
    child.update(REQUIRED_ENVIRONMENT)
    child.update(dict.fromkeys(THREAD_VARIABLES, str(num_threads)))
    return child


def is_environment_ready(num_threads: int) -> bool:
    """Whether this process was started as ``python_command`` and with the environment it needs."""
    if not sys.flags.safe_path or os.environ.items() >= SAFE_PATH.items():
        return False
    return is_environment_set(num_threads)


def is_environment_set(num_threads: int) -> bool:
    """Whether this process was started with the environment that a training needs."""
    return all(
        os.environ.get(name) == value for name, value in child_environment(num_threads, {}).items()
    )


def default_num_threads(environment: Mapping[str, str] = os.environ) -> int:
    """Threads that a run begins with: ``OMP_NUM_THREADS`` where it is set, as for torch itself.

    Else the cores that this process may use. Of a list, such as ``4,2``, the first number counts.
    """
    wanted = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) else len(os.sched_getaffinity(0))


def set_up_torch(mode: Literal["deterministic", "speed"], num_threads: int) -> None:
    """Set torch's switches for this process. Call before any other use of torch."""
    import torch

    is_deterministic = mode == "deterministic"
    torch.set_num_threads(num_threads)
    # Not use_deterministic_algorithms, which imports the compiler: a second of every start.
    torch.set_deterministic_debug_mode("error" if is_deterministic else "default")
    fills_memory = os.environ.items() >= FILLED_MEMORY.items()
    torch.utils.deterministic.fill_uninitialized_memory = fills_memory  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = is_deterministic
    torch.backends.cudnn.benchmark = not is_deterministic


def compile_statically(model: nn.Module) -> None:
    """Compile a model in place, each input shape by itself.

    By default torch generalises a kernel once it has seen a second shape, so that which kernel
    runs would depend on which shapes this process happened to see first.
    """
    import torch

    # Tells the compiler of the mode that set_up_torch has set.
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())
    torch._dynamo.config.recompile_limit = 256  # past the limit it would fall back to eager
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model.compile(dynamic=False)
