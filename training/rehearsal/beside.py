"""A snapshot beside the computation, held against one of the same moment that was taken at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from holdfast.training.checkpointing.overlap import Changed, Overlap, weights_among
from holdfast.training.checkpointing.snapshot import SnapshotBuffers
from holdfast.training.loop.state import TrainState
from holdfast.training.rehearsal.captured import capture, differing, digests_of


def differing_beside(state: TrainState, overlap: Overlap, step: Callable[[], None]) -> list[str]:
    """Tensors that a snapshot beside a step has otherwise than one of before that step.

    Takes two steps: what the first one shows to be changed outside updates is copied at once.
    """
    with ThreadPoolExecutor(1) as thread:
        tensors, _ = state.capture()
        overlap.learn(tensors, state.changed_by_updates(tensors), thread)
        step()
        overlap.before_change()
        tensors, _ = state.capture()
        late = overlap.late(tensors, state.changed_by_updates(tensors))
    at_once = digests_of(capture(state).tensors)
    buffers, changed = SnapshotBuffers(), list[Changed]()
    buffers.take(tensors, late)
    if not buffers.put_off:
        return []
    overlap.begin(buffers.put_off, weights_among(tensors, late), changed.append)
    step()
    overlap.before_change()
    overlap.wait()
    is_snapshot = not changed[0]()
    return differing(at_once, digests_of(buffers.copies)) if is_snapshot else []
