"""Be the writer of a run in its bucket, and keep the bucket up to date, while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.training.errors import HoldfastError
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.probe import require_fit
from holdfast.training.tiers.bandwidth import asked_limit
from holdfast.training.tiers.head import HeadLease
from holdfast.training.tiers.replica import Replica, Tell
from holdfast.training.tiers.scratch import address_of, run_name

END_PATIENCE_S = 300.0
GRACE_S = 30.0


@contextmanager
def opened_replica(
    run: RunDirectory,
    *,
    wait_s: float = 0.0,
    can_begin_early: bool = False,
    tell: Tell = lambda _: None,
) -> Iterator[Replica | None]:
    """Be the writer of a run in its bucket while the block runs; None for a run in a folder.

    On entry the folder is made what the bucket has; at the end the head is released. What the
    block writes is brought up by ``kept_up``. Where it ``can_begin_early``, files of older
    checkpoints come after entry, and who reads them waits by ``late_files.await_files``.

    Raises:
        LeaseHeldError: another process writes this run, and still did after ``wait_s``.
        InputError: the store is not fit, or cannot be found.
        StorageError: it does not answer.
    """
    address = address_of(run.path.parent.parent)
    if address is None:
        yield None
        return
    store = open_store(address)
    require_fit(store, str(address))
    throttle = asked_limit()
    head = HeadLease.acquire(store, run_name(run), wait_s=wait_s, on_wait=tell)
    replica = Replica(store, run, head, tell, throttle)
    try:
        replica.restore(can_begin_early=can_begin_early)
        yield replica
    finally:
        if head.head.tree is None:  # it was refused before it began
            head.remove()
        else:
            head.release()


@contextmanager
def kept_up(
    replica: Replica | None, *, patience_s: float = END_PATIENCE_S, grace_s: float = GRACE_S
) -> Iterator[None]:
    """Keep the bucket up to date while the block runs; it has all when the block is left.

    Args:
        replica: of ``opened_replica``; nothing is done for None.
        patience_s: how long a bucket that does not answer is waited for at the end.
        grace_s: the same where the block ends by an error or a notice.

    Raises StorageError where it lacks the end, which is on this machine then.
    """
    if replica is None:
        yield
        return
    replica.start()
    try:
        yield
    except BaseException:
        _finish_after_error(replica, grace_s)
        raise
    replica.finish(patience_s)


def _finish_after_error(replica: Replica, grace_s: float) -> None:
    """What failed matters more than that the bucket is behind, too."""
    try:
        replica.finish(grace_s, is_urgent=True)
    except HoldfastError as error:
        replica.tell(str(error))
