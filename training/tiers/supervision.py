"""One stage of a run in a bucket: a child trains on the scratch disk, this process keeps it up.

So no call to a bucket is made in the process that trains: its signals are answered at once, and its
loader processes may be forked.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.preemption.deathwatch import EXIT_PREEMPTED, watched
from holdfast.training.preemption.signals import NOTICE_SIGNALS
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import parse_address
from holdfast.training.tiers.keeping import END_PATIENCE_S, GRACE_S, opened_replica
from holdfast.training.tiers.scratch import tier_folder

LOOK_EVERY_S = 0.2


def run_supervised(arguments: Sequence[str], store: str, name: str) -> int:
    """Run ``python -m holdfast.training ARGUMENTS`` on the scratch disk; its exit code.

    ``name`` is ``experiment/run_id``.

    Notice signals must be held back in this process; they are passed on. After return the bucket
    has what was saved. Raises InputError, LeaseHeldError or StorageError.
    """
    work = tier_folder(parse_address(store), "work")
    run = RunDirectory(work / name)
    replaced = {store: str(work), f"--store={store}": f"--store={work}"}
    command = python_command(
        "holdfast.training", *(replaced.get(argument, argument) for argument in arguments)
    )
    with opened_replica(run, can_begin_early=True, tell=_tell) as replica:
        assert replica is not None
        replica.start()
        code = _run_child(command)
        is_notice = code == EXIT_PREEMPTED
        replica.finish(GRACE_S if is_notice else END_PATIENCE_S, is_urgent=is_notice)
    return code


def _run_child(command: list[str]) -> int:
    child = subprocess.Popen(watched(command), process_group=0)
    while child.poll() is None:
        time.sleep(LOOK_EVERY_S)
        # Not sigtimedwait: after a SIGSTOP and a SIGCONT, Python's returns a signal that none sent.
        for number in signal.sigpending() & {*NOTICE_SIGNALS}:
            child.send_signal(signal.sigwait({number}))
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _tell(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)
