"""What one rank does: rank 0 is the run's writer, the others train along."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.training.checkpointing.finite import is_slice
from holdfast.training.checkpointing.json_state import encode
from holdfast.training.checkpointing.loading import RestoredCheckpoint, load_checkpoint
from holdfast.training.checkpointing.manager import told_differences
from holdfast.training.checkpointing.manifest import (
    local_folder,
    manifest_digest,
    manifest_of,
    verify,
)
from holdfast.training.checkpointing.policy import (
    CheckpointInfo,
    build_schedule,
)
from holdfast.training.checkpointing.slices import WHOLE
from holdfast.training.distributed.stopping import AgreedMonitor
from holdfast.training.distributed.watchdog import answer_for_stacks
from holdfast.training.distributed.world import World
from holdfast.training.errors import ExperimentError, HoldfastError, InputError, RankLostError
from holdfast.training.exactness.trial import asked_trial
from holdfast.training.exactness.versions import device_name
from holdfast.training.loop.experiment_state import Stateful
from holdfast.training.loop.saving import NothingSaved
from holdfast.training.loop.segment import Together, build_trainer, run_segment
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.train_step import resolve_device
from holdfast.training.loop.trainer import Trainer
from holdfast.training.preemption.notices import Notice
from holdfast.training.ranks.carrying import Carrier, carry
from holdfast.training.ranks.evaluation import measured_together
from holdfast.training.ranks.slice_files import (
    others_of_first,
    saving_of_first,
    saving_of_other,
)
from holdfast.training.runs.costs import Costs
from holdfast.training.runs.directory import RunRecord
from holdfast.training.runs.segment_log import log_path
from holdfast.training.stage import EXIT_PREEMPTED, NoticeCameError, Stage, StageOutcome
from holdfast.training.tiers.scratch import address_of

logger = logging.getLogger(__name__)

BEGIN = "begin"
SEEN_S = 30.0
"""For a file server's caches."""
COMPARED = (
    "config",
    "config_digest",
    "experiment_digest",
    "data_fingerprint",
    "versions",
    "num_threads",
)


def run_rank(stage: Stage) -> StageOutcome:
    """As ``run_segment``, for one of several ranks. Raises what that raises, and RankLostError."""
    world = stage.world
    assert world is not None
    answer_for_stacks()
    device = resolve_device(stage.config.train.device)
    require_same_run(stage.record, world, device_name(device.type))
    if device.type == "cuda" and world.size > 1 and world.rank == 0:
        logger.warning(
            "several GPUs: Holdfast's own tests have not run on several so far; see `On GPUs` in "
            "docs/several_processes.md"
        )
    num_machines = len({*world.gathered(world.first_here)})
    carrier = _carrier(stage, world)
    if world.rank > 0:
        return _follow(stage, world, carrier)
    together = Together(
        prepare=lambda trainer: _prepare(trainer, world),
        begin=lambda segment, info: _tell_begin(stage, world, segment, info),
        before_fit=lambda: _vote(stage),
        num_processes=world.size,
        num_machines=num_machines if num_machines > 1 else None,
        saving=lambda trainer, saver: saving_of_first(trainer.state, saver, world),
        others=lambda trainer: others_of_first(trainer.state, world, stage.run.path, carrier),
    )
    try:
        return run_segment(stage, together)
    except NoticeCameError:
        world.tell(BEGIN, None)
        raise


def require_same_run(record: RunRecord, world: World, device: str = "") -> None:
    """Collective. Raises InputError where ranks have different code, data, configurations or GPUs.

    ``device`` is the name of what this rank trains on, where that is known.
    """
    known = record.model_dump(mode="json")
    mine = {"device": device, **{key: known[key] for key in COMPARED}}
    for rank, theirs in enumerate(world.gathered(mine)):
        found = next(told_differences(theirs, mine), None)
        if found is not None:
            raise InputError(
                f"rank {rank} differs from rank {world.rank} in {found}; all processes of a "
                f"training need the same configuration, code, data and kind of device, and nothing "
                f"of them may depend on the process"
            )


def _prepare(trainer: Trainer, world: World) -> None:
    """Make a trainer one of several."""
    trainer.measure = lambda trainer: _measured(trainer, world)
    state = trainer.state
    first = weights_digest(state) if state.spread is None else state.spread.first_digest
    _require_same(world, "weights to begin with", first)


def _measured(trainer: Trainer, world: World) -> dict[str, float] | None:
    """Validate together, after a look whether all ranks still are the same training."""
    _require_same(world, "weights", weights_digest(trainer.state))
    _require_same(world, "state_dict() of the experiment", experiment_digest(trainer.state))
    return measured_together(trainer, world)


def _require_same(world: World, what: str, digest: str) -> None:
    digests = world.gathered(digest)
    others = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if others:
        raise ExperimentError(
            f"ranks {', '.join(map(str, others))} have other {what} than rank 0: what is kept from "
            f"step to step must not depend on the samples that one process has seen, nor on draws "
            f"that are not seeded; keep it in buffers of the model, or train with "
            f"distributed.strategy=none"
        )


def _carrier(stage: Stage, world: World) -> Carrier | None:
    """Collective. What brings slices to rank 0's disk, where there are any on others."""
    has_own_disk = world.gathered(_has_own_scratch(stage))
    ranks = [rank for rank, has in enumerate(has_own_disk) if has]
    is_needed = ranks and stage.config.distributed.strategy == "fsdp"
    return Carrier(world, ranks) if is_needed else None


def _follow(stage: Stage, world: World, carrier: Carrier | None) -> StageOutcome:
    """Train along with rank 0, which restores, saves and records."""
    trainer = build_trainer(stage, Costs())
    _prepare(trainer, world)
    begin = world.awaited(BEGIN)
    if begin is None:
        raise NoticeCameError(None)
    if not is_guest(world):  # what others say is told by the command that has started them
        stage.log.open(log_path(stage.run.logs, begin["segment"], world.rank))
    restored = _restore(stage, trainer, begin)
    with closing(trainer.loader):
        if trainer.is_finished():
            return StageOutcome("completed", 0, step=trainer.state.counters.step)
        is_measured = restored is not None and restored.manifest.info.is_selectable
        schedule = build_schedule(stage.config.checkpoint)
        saver = saving_of_other(
            trainer.state,
            Follower(schedule, trainer.state, is_measured=is_measured),
            world,
            stage.run.path,
            carrier,
        )
        _vote(stage)
        trial = asked_trial()
        ended = trainer.fit(saver, on_step=lambda step: trial.after_step(step, world.rank))
    code = EXIT_PREEMPTED if ended.outcome == "preempted" else 0
    return StageOutcome(ended.outcome, code, step=ended.step, notice=_own_notice(stage))


def _own_notice(stage: Stage) -> dict[str, Any] | None:
    """That this rank's machine goes away, for the command that has joined the run on it."""
    own = stage.monitor.own_notice()
    return None if own is None else own.as_record(time.monotonic())


def _vote(stage: Stage) -> None:
    assert isinstance(stage.monitor, AgreedMonitor)
    stage.monitor.vote()


def _tell_begin(stage: Stage, world: World, segment: int, info: CheckpointInfo | None) -> None:
    """Rank 0: what the others begin with."""
    told: dict[str, Any] = {"segment": segment, "checkpoint": None, "manifest_digest": None}
    if info is not None:
        folder = stage.run.checkpoint(info.step)
        digest = manifest_digest(local_folder(folder))
        told |= {"checkpoint": folder.name, "manifest_digest": digest}
    world.tell(BEGIN, told)
    carry(world, None if info is None else folder, is_here=True)


def is_guest(world: World) -> bool:
    """Whether this machine has joined a run that another one has started."""
    return world.first_here > 0


def _restore(stage: Stage, trainer: Trainer, begin: Any) -> RestoredCheckpoint | None:
    """Put back the checkpoint that rank 0 has chosen, the same bytes."""
    assert stage.world is not None
    if begin["checkpoint"] is None:
        _require_common_folder(stage, stage.run.run_json)
        carry(stage.world, None, is_here=True)
        return None
    path = stage.run.checkpoints / begin["checkpoint"]
    if _has_own_scratch(stage):
        carry(stage.world, path, is_here=_is_digest(path, begin["manifest_digest"]))
    else:
        _require_common_folder(stage, path)
        carry(stage.world, path, is_here=True)
    digest = manifest_digest(local_folder(path))
    if digest != begin["manifest_digest"]:
        raise RankLostError(
            f"{path} is not the checkpoint that rank 0 has restored: its manifest has the "
            f"digest {digest} here, {begin['manifest_digest']} there"
        )
    folder = local_folder(path)
    manifest = manifest_of(folder)
    slicing = trainer.state.spread or WHOLE
    restored = load_checkpoint(folder, manifest, slicing=slicing, only_own=True)
    lineage = stage.record.lineage
    is_its_begin = lineage is not None and manifest.step == lineage.step
    trainer.state.restore(restored.tensors, restored.state, lineage if is_its_begin else None)
    return restored


def _has_own_scratch(stage: Stage) -> bool:
    """Whether this machine has no folder in common with rank 0's: the store is a bucket."""
    assert stage.world is not None
    return is_guest(stage.world) and address_of(stage.run.path.parent.parent) is not None


def _is_digest(path: Path, digest: str) -> bool:
    """Whether this very checkpoint has been carried here before, and is whole."""
    try:
        return manifest_digest(local_folder(path)) == digest and verify(path).step >= 0
    except (FileNotFoundError, HoldfastError):
        return False


def _require_common_folder(stage: Stage, path: Path) -> None:
    """Raise InputError on a machine that has another folder as its store than rank 0's.

    A folder on a server may show what was written elsewhere only after a while.
    """
    assert stage.world is not None
    if not is_guest(stage.world) or _has_own_scratch(stage):
        return
    deadline_s = time.monotonic() + SEEN_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise InputError(
                f"{path} is not there on this machine: all machines of a run need the same folder "
                f"as their --store, or a bucket"
            )
        time.sleep(SEEN_S / 100)


class Follower(NothingSaved):
    """Knows when all ranks validate; rank 0's ``Saver`` does the rest."""

    def stop(self, notice: Notice) -> None:
        """Tell why this rank ends."""
        logger.info("stopping after step %d: %s", self._state.counters.step, notice.reason)


def weights_digest(state: TrainState) -> str:
    """Of all tensors that this rank has whole, with their names."""
    tensors = {n: t for n, t in state.model.state_dict().items() if isinstance(t, Tensor)}
    return _digest({name: t for name, t in tensors.items() if not is_slice(t)})


def experiment_digest(state: TrainState) -> str:
    """Of the experiment's own state; of one that has none, always the same."""
    if not isinstance(state.experiment, Stateful):
        return ""
    tensors: dict[str, Tensor] = {}
    values = encode(state.experiment.state_dict(), "experiment", tensors, keeps_order=True)
    return f"{hashlib.sha256(repr(values).encode()).hexdigest()}/{_digest(tensors)}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        tensor = tensors[name].detach().cpu().contiguous().view(-1)
        if tensor.numel():
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
