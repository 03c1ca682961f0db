"""Small checkpoints, and a manager for them, that the tests of this folder build on."""

from __future__ import annotations

import ctypes
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.training.checkpointing.manager import (
    CheckpointContents,
    CheckpointIdentity,
    CheckpointManager,
)
from holdfast.training.checkpointing.policy import KeepLast, Retention, Trigger
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory

IDENTITY = CheckpointIdentity(
    config_digest="digest-1",
    versions={"torch": "2.13.0"},
    device="cpu x86_64",
    segment=1,
    config={"optimizer": {"args": {"lr": 0.1}}},
)
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
DISK_BYTES = 8 * 2**20
SKIPPED = 77
KEEP_ALL: tuple[Retention, ...] = (KeepLast(1000),)


def tensors_at(step: int) -> dict[str, dict[str, Tensor]]:
    """Some state that is a function of the step alone."""
    values = torch.arange(2000, dtype=torch.float32) * step
    return {
        "model": {"layer.weight": values.reshape(40, 50), "layer.bias": values[:50] + 1},
        "optimizer": {"layer.weight/exp_avg": -values.reshape(40, 50)},
        "ema": {"decay-0.9/layer.weight": values.reshape(40, 50) / 2},
        "state": {"torch.cpu": (torch.arange(5056) % (step + 2)).to(torch.uint8)},
    }


def flip_bit(path: Path) -> None:
    """As a disk may do."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def contents_at(step: int, trigger: Trigger = "steps", **metrics: float) -> CheckpointContents:
    return CheckpointContents(
        step=step,
        epoch=step // 10,
        trigger=trigger,
        metrics=metrics,
        tensors=tensors_at(step),
        state={"counters": {"step": step}, "history": [0.5, None, True, "x"]},
    )


@contextmanager
def managing(
    run: RunDirectory,
    policies: Sequence[Retention] = KEEP_ALL,
    **identity: Any,
) -> Iterator[CheckpointManager]:
    """A manager that holds the run's lease."""
    with Lease.acquire(run, 30.0) as lease:
        yield CheckpointManager(run, lease, replace(IDENTITY, **identity), policies)


def save_steps(run: RunDirectory, *steps: int) -> None:
    with managing(run) as manager:
        for step in steps:
            manager.save(contents_at(step), wait=True)


def assert_holds(tensors: dict[str, dict[str, Tensor]], step: int) -> None:
    """The tensors are those of the step, bit by bit."""
    expected = tensors_at(step)
    assert tensors.keys() == expected.keys()
    for stem, inner in expected.items():
        assert tensors[stem].keys() == inner.keys()
        for name, tensor in inner.items():
            assert torch.equal(tensors[stem][name], tensor), f"{stem}.{name}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(action: Callable[[], None]) -> int:
    """Run it in a forked process; returns the exit code, negative for the signal that ended it."""
    with warnings.catch_warnings():
        # From Python 3.12 on: "may lead to deadlocks". The child starts threads of its own only.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:  # noqa: BLE001  # told here; the parent sees the exit code
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def mount_small_disk(folder: Path) -> None:
    """A tmpfs that only this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNS if os.geteuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER
    private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC
    if libc.unshare(flags) or libc.mount(None, b"/", None, private, None):
        raise SystemExit(SKIPPED)
    options = f"size={DISK_BYTES}".encode()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, options):
        raise SystemExit(SKIPPED)


def on_a_small_disk(folder: Path, action: Callable[[Path], None]) -> None:
    """Run it in a process that has a disk of its own mounted there; skip where it must not."""

    def act() -> None:
        mount_small_disk(folder)
        action(folder)

    code = in_child(act)
    if code == SKIPPED:
        pytest.skip("this system does not let us mount a small disk")
    assert code == 0
