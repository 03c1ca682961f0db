"""One segment: build the parts, restore, train, and leave a record."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from holdfast.training.averages.ema import MovingAverages
from holdfast.training.checkpointing.manager import CheckpointIdentity, CheckpointManager
from holdfast.training.checkpointing.overlap import Overlap
from holdfast.training.checkpointing.policy import (
    CheckpointInfo,
    build_crossings,
    build_retention,
    build_schedule,
    mean_time_between_preemptions_s,
)
from holdfast.training.checkpointing.storage import NOBODY, OtherWriters
from holdfast.training.code.archive import keep_code
from holdfast.training.configuration.loading import (
    config_digest,
    config_from_record,
    digested_values,
)
from holdfast.training.configuration.schema import CheckpointConfig, RunConfig, WarmupConfig
from holdfast.training.data.fetching import Shares
from holdfast.training.data.loader import (
    BatchPlan,
    FixedSizePlan,
    Loader,
    Microbatch,
    OwnOrderPlan,
    TokenPlan,
)
from holdfast.training.data.own_order import own_order, own_permutation
from holdfast.training.device.copy_stream import copy_stream
from holdfast.training.device.reading import device_reader
from holdfast.training.distributed.refusals import refuse_wrappers
from holdfast.training.distributed.row_norm import RowNorm
from holdfast.training.distributed.sharded_step import ShardedStep
from holdfast.training.distributed.stopping import AgreedMonitor
from holdfast.training.distributed.world import World
from holdfast.training.errors import (
    CheckpointNotFoundError,
    ConfigError,
    ExperimentError,
    LossJumpError,
    NonFiniteLossError,
)
from holdfast.training.exactness.reproducibility import compile_statically
from holdfast.training.exactness.seeding import seed_generators
from holdfast.training.exactness.trial import asked_trial
from holdfast.training.exactness.versions import device_name, library_versions
from holdfast.training.experiment.loading import own_file
from holdfast.training.experiment.protocol import Dataset, hook
from holdfast.training.experiment.streamed import ENDLESS, Streamed
from holdfast.training.loop.loss_record import LossRecord
from holdfast.training.loop.revalidation import repeat_validation
from holdfast.training.loop.saving import Saver
from holdfast.training.loop.segment_record import RecordKeeper
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.state_validation import validate_state
from holdfast.training.loop.train_step import TrainStep, gradient_scaler, resolve_device
from holdfast.training.loop.trainer import Saving, Trainer, steps_of_epoch
from holdfast.training.optimizers.building import build_optimizers
from holdfast.training.optimizers.elementwise import require_elementwise
from holdfast.training.optimizers.schedule import Schedule
from holdfast.training.runs.costs import Costs
from holdfast.training.runs.directory import read_segments, run_identity
from holdfast.training.runs.event_log import check_event_log, event_file, told_to_event_file
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.segment_log import log_path
from holdfast.training.spikes.rollbacks import (
    decide,
    forget_losses,
    publish,
    read_rollbacks,
    require_shorter_than_epochs,
)
from holdfast.training.spikes.watch import SpikeWatch
from holdfast.training.stage import EXIT_PREEMPTED, Stage, StageOutcome, await_checkpoint
from holdfast.training.tiers.bandwidth import UploadPace
from holdfast.training.tracking.sending import tracked
from holdfast.training.tracking.tracker import check_trackers
from holdfast.training.weights.frozen import frozen_of

if TYPE_CHECKING:
    from holdfast.training.distributed.spreading import Spread


def _nothing(*_: object) -> None:
    """What a segment of one process tells others."""


def _saving_alone(_: Trainer, saver: Saver) -> Saving:
    return saver


def _nobody(_: Trainer) -> OtherWriters:
    return NOBODY


@dataclass(frozen=True)
class Together:
    """What a segment does for the other processes of its training, where there are any.

    Attributes:
        prepare: the trainer, before anything is restored.
        begin: is told the segment's number and the restored checkpoint, before the first step.
        before_fit: is called when all is ready.
        num_processes: what the segment's record says; None where it says nothing.
        num_machines: the same, of the machines that these are on.
        saving: what the trainer is given in the place of the saver.
        others: which of them write files of checkpoints.
    """

    prepare: Callable[[Trainer], None] = _nothing
    begin: Callable[[int, CheckpointInfo | None], None] = _nothing
    before_fit: Callable[[], None] = _nothing
    num_processes: int | None = None
    num_machines: int | None = None
    saving: Callable[[Trainer, Saver], Saving] = _saving_alone
    others: Callable[[Trainer], OtherWriters] = _nobody


ALONE = Together()


def run_segment(stage: Stage, together: Together = ALONE) -> StageOutcome:
    """Train from the newest checkpoint to the end or to a notice.

    A run that is finished is left as it is. Raises what ``Trainer.fit`` raises, after the error
    was written to the segment's record.
    """
    check_event_log(stage.config.logging)
    check_trackers(stage.config.tracking)
    costs = Costs()
    with costs.measured("startup"):
        trainer = build_trainer(stage, costs)
        together.prepare(trainer)
        train, epochs = trainer.config.train, range(trainer.config.train.num_epochs)
        require_shorter_than_epochs(
            stage.config.spikes, (steps_of_epoch(train, trainer.plan, epoch) for epoch in epochs)
        )
        if not stage.run.run_json.exists():
            trainer.state.schedule.require_length(trainer.num_steps(), trainer.epoch_ends())
    with stage.writing() as lease:
        if (file := own_file(stage.arguments.experiment)) is not None:
            keep_code(stage.run, lease, stage.arguments.folder / file)
        keeper = RecordKeeper(stage.run, lease, costs.seconds, stage.config.logging.every_s)
        stage.log.open(log_path(stage.run.logs, keeper.number))
        with (
            keeper.failure_recorded(),
            tracked(stage.run, stage.config.tracking, stage.progress) as trackers,
            closing(trainer.loader),
        ):
            ended = _train(stage, trainer, lease, keeper, together)
            trackers.is_completed = ended.outcome == "completed"
            return ended


def _train(
    stage: Stage, trainer: Trainer, lease: Lease, keeper: RecordKeeper, together: Together
) -> StageOutcome:
    manager = build_manager(stage, trainer, lease, keeper.number, together.others(trainer))
    with trainer.costs.measured("restore"):
        for rollback in read_rollbacks(stage.run):
            manager.forget(rollback.first, rollback.segment)
        forget_losses(stage.run, lease, trainer.state.left_out)
        start_step = restore(stage, manager, trainer.state)
        repeat_validation(
            trainer,
            stage.run,
            manager.differences,
            is_mismatch_allowed=stage.arguments.should_allow_mismatch,
        )
    together.begin(keeper.number, manager.restored)
    if trainer.is_finished():
        return StageOutcome("completed", 0, step=start_step)
    keeper.begin(start_step, together.num_processes, together.num_machines)
    together.before_fit()
    stage.progress.emit("started", step=start_step, segment=keeper.number)
    saver, trial = build_saver(stage, trainer, manager), asked_trial()
    own_place = () if stage.world is None else (stage.world.rank, stage.world.launcher_pid)
    try:
        with (
            saver.settled_on_error(),
            _event_log(stage, keeper.number, start_step),
            closing(
                LossRecord(stage.run, keeper.number, start_step, stage.config.logging.every_s)
            ) as losses,
        ):
            saver.before_save = losses.sync_later

            def after_step(step: int) -> None:
                if step == start_step + 1:
                    saver.prepare()
                losses.add(trainer.train_step.last_loss)
                keeper.advance(step)
                trial.after_step(step, *own_place)

            trainer.beat = stage.watch.beat
            try:
                ended = trainer.fit(together.saving(trainer, saver), on_step=after_step)
            finally:
                stage.watch.end()
    except (NonFiniteLossError, LossJumpError) as error:
        if trainer.state.watch is None:
            raise
        return _rolled_back(stage, trainer, lease, keeper, error)
    keeper.end(ended.outcome, ended.step, ended.notice, manager.save_s())
    exit_code = EXIT_PREEMPTED if ended.outcome == "preempted" else 0
    notice = None if ended.notice is None else ended.notice.as_record(time.monotonic())
    return StageOutcome(ended.outcome, exit_code, step=ended.step, notice=notice)


def _rolled_back(
    stage: Stage,
    trainer: Trainer,
    lease: Lease,
    keeper: RecordKeeper,
    error: NonFiniteLossError | LossJumpError,
) -> StageOutcome:
    """Write down which steps are left out for a spike; a process anew goes back before them.

    Raises what ``decide`` raises.
    """
    left_out, lineage = trainer.state.left_out, stage.record.lineage
    is_jump = isinstance(error, LossJumpError)
    found = decide(
        stage.config.spikes,
        left_out,
        error.step,
        str(error) if is_jump else f"the loss of step {error.step} is not finite",
        segment=keeper.number,
        begin_step=0 if lineage is None else lineage.step,
        epoch_ends=trainer.epoch_ends(),
    )
    publish(stage.run, lease, [*left_out, found])
    keeper.fail(error)
    stage.progress.emit("spike", step=found.step, reason=found.reason, left_out_from=found.first)
    step = trainer.state.counters.step
    return StageOutcome("preempted", EXIT_PREEMPTED, step=step, should_start_again=True)


def _event_log(stage: Stage, segment: int, start_step: int) -> AbstractContextManager[None]:
    if not stage.config.logging.tensorboard:
        return nullcontext()
    path = event_file(stage.run.tensorboard, segment)
    return told_to_event_file(stage.progress, path, start_step)


def build_trainer(stage: Stage, costs: Costs) -> Trainer:
    """All parts of a training that has not begun. Draws the model from the run's seed."""
    config, experiment = stage.config, stage.experiment
    device = resolve_device(config.train.device)
    dataset = experiment.dataset("train")
    plan = batch_plan(dataset, config, stage.seed("order"))
    state = build_state(stage, plan, device)
    shards = sharded_step(stage, state, device)
    norm = row_norm(stage, state)
    train_step = TrainStep(experiment, config.train, state, device, config.seed, shards, norm)
    loader = Loader(
        dataset,
        plan,
        num_microbatches=config.train.num_microbatches,
        num_workers=config.data.num_workers,
        has_persistent_workers=config.data.has_persistent_workers,
        prefetch_factor=config.data.prefetch_factor,
        seed=stage.seed("order"),
        should_pin=device.type == "cuda",
        shares=shares_of(config, stage.world),
        is_ahead=True,
    )
    return Trainer(
        experiment=experiment,
        config=_ended_by_trial(config),
        state=state,
        plan=plan,
        loader=loader,
        validation=experiment.dataset("validation"),
        train_step=train_step,
        monitor=stage.monitor,
        progress=stage.progress,
        costs=costs,
    )


def _ended_by_trial(config: RunConfig) -> RunConfig:
    """What the loop goes by: a trial ends it sooner, and its digest is that of the whole run."""
    end_at, train = asked_trial().end_at, config.train
    if end_at is None:
        return config
    ended = train.model_copy(update={"max_steps": min(end_at, train.max_steps or end_at)})
    return config.model_copy(update={"train": ended})


def sharded_step(
    stage: Stage, state: TrainState, device: torch.device
) -> ShardedStep[Microbatch] | None:
    """What does the shards of steps; None where steps have none."""
    config = stage.config.distributed
    if config.strategy == "none":
        return None
    world = stage.world or World.alone()
    is_on_gpus = device.type == "cuda" and world.size > 1
    monitor = stage.monitor if isinstance(stage.monitor, AgreedMonitor) else None
    return ShardedStep(
        state.model,
        world,
        stage.seed("training"),
        num_shards=config.num_parts,
        is_in_tree=config.num_shards is not None or is_on_gpus,  # NCCL's order is the machine's
        are_alike=has_shards_in_slices(stage.config),
        monitor=monitor,
        spread=state.spread,
    )


def has_shards_in_slices(config: RunConfig) -> bool:
    """Whether weights may lie in slices on any number of ranks, one included, with equal bits."""
    return config.distributed.strategy == "fsdp" and config.distributed.num_shards is not None


def row_norm(stage: Stage, state: TrainState) -> RowNorm | None:
    """What clips gradients with the same bits on any number of ranks; None for torch's own."""
    if not has_shards_in_slices(stage.config):
        return None
    return RowNorm(stage.world or World.alone(), state.spread)


def shares_of(config: RunConfig, world: World | None) -> Shares | None:
    """How steps are cut into shards, and which this process has; None where they have none."""
    if config.distributed.strategy == "none":
        return None
    num_parts = config.distributed.num_parts
    if world is None:
        return Shares(num_parts)
    return Shares(num_parts, world.rank, world.size, has_shards_in_slices(config))


def build_state(stage: Stage, plan: BatchPlan, device: torch.device) -> TrainState:
    """The state before the first step: the model, and generators for training, from the seed."""
    config = stage.config
    seed_generators(stage.seed("model"))
    model = stage.experiment.model()
    require_shapes(model)
    model = model.to(device)
    model.train()
    if config.train.should_compile:
        compile_statically(model)
    refuse_wrappers(model)
    spread = _spread(stage, model)
    optimizers = build_optimizers(stage.experiment, config.optimizer, model)
    refuse_wrappers(nn.Identity(), optimizers.values())
    if has_shards_in_slices(config):
        require_elementwise(optimizers.values())
    frozen = frozen_of(model, config.checkpoint)
    state = TrainState(
        model=model,
        optimizers=optimizers,
        schedule=Schedule(
            optimizers,
            config.scheduler,
            in_steps(config, plan),
            steps_of_epoch(config.train, plan, 0),
            stage.experiment,
        ),
        averages=MovingAverages(model, config.ema, () if frozen is None else frozen.names),
        gradient_scaler=gradient_scaler(config.train, device),
        loss_sum=torch.zeros((), dtype=torch.float64, device=device),
        experiment=stage.experiment,
        frozen=frozen,
        watch=None if config.spikes.num_left_out is None else SpikeWatch(config.spikes, device),
        left_out=read_rollbacks(stage.run),
        spread=spread,
    )
    seed_generators(stage.seed("training"))
    return state


def _spread(stage: Stage, model: nn.Module) -> Spread | None:
    """The model's slices on the ranks; None where each has all of it."""
    world, is_in_tree = stage.world or World.alone(), has_shards_in_slices(stage.config)
    is_alone = stage.config.distributed.strategy != "fsdp" or world.size == 1
    if is_alone and not is_in_tree:
        return None
    from holdfast.training.distributed.spreading import Spread, require_sliceable

    require_sliceable(model)
    if is_alone:
        return None
    if stage.config.train.precision == "fp16":
        raise ConfigError(
            "train.precision=fp16 scales losses by what each process finds in its own slices: with "
            "distributed.strategy=fsdp write bf16 or fp32"
        )
    return Spread(model, world, hook(stage.experiment, "parallelize"), is_in_tree=is_in_tree)


def require_shapes(model: nn.Module) -> None:
    """Make sure that every layer knows its shape. Raises ExperimentError for a lazy one."""
    named = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in named if is_lazy(tensor)]
    if lazy:
        raise ExperimentError(
            f"{lazy[0]} of the model {type(model).__name__} has no shape yet, its layer is lazy: "
            f"give it its size, or let model() call the model once on a batch"
        )


def build_manager(
    stage: Stage, trainer: Trainer, lease: Lease, segment: int, others: OtherWriters = NOBODY
) -> CheckpointManager:
    """What saves and restores this run, as its only writer."""
    config = stage.config
    identity = CheckpointIdentity(
        config_digest=stage.record.config_digest,
        versions=library_versions(),
        device=device_name(trainer.state.loss_sum.device.type),
        segment=segment,
        config=_digested(stage),
        run=run_identity(stage.record),
    )
    retention = build_retention(config.checkpoint, config.selection, config.ema, config.spikes)
    overlap = build_overlap(config.checkpoint, trainer.state)
    return CheckpointManager(
        stage.run,
        lease,
        identity,
        retention,
        overlap=overlap,
        others=others,
        await_files=partial(await_checkpoint, stage.run, stage.monitor),
    )


def build_overlap(config: CheckpointConfig, state: TrainState) -> Overlap | None:
    """What copies snapshots of this state beside the computation; None where nothing can."""
    is_asked_for = (
        config.should_overlap and state.spread is None
    )  # slices are copied by all at once
    stream = copy_stream(state.loss_sum.device) if is_asked_for else None
    if stream is None:
        return None
    overlap = Overlap(stream)
    overlap.watch(state.optimizers.values())
    state.averages.before_change = overlap.before_change
    return overlap


def _digested(stage: Stage) -> dict[str, Any]:
    """The values that the run's digest covers; of the choice alone, others may be asked for now."""
    is_same = config_digest(stage.config) == stage.record.config_digest
    config = stage.config if is_same else config_from_record(stage.record.config)
    return digested_values(config)


def build_saver(stage: Stage, trainer: Trainer, manager: CheckpointManager) -> Saver:
    """What decides when to save, with what the run's earlier segments teach."""
    config = stage.config
    mtbp_s = mean_time_between_preemptions_s(
        read_segments(stage.run)[:-1], config.checkpoint.mean_time_between_preemptions_s
    )
    return Saver(
        manager=manager,
        schedule=build_schedule(config.checkpoint),
        crossings=build_crossings(config.checkpoint),
        mtbp_s=mtbp_s,
        state=trainer.state,
        guard=trainer.train_step.guard,
        monitor=stage.monitor,
        preemption=config.preemption,
        progress=stage.progress,
        costs=trainer.costs,
        pace=UploadPace(stage.run, config.preemption.grace_period_s),
    )


def in_steps(config: RunConfig, plan: BatchPlan) -> WarmupConfig:
    """The same warm-up, told in steps alone: an epoch may have another number of them each time."""
    warmup, epochs = config.warmup, range(config.warmup.num_epochs)
    of_epochs = sum(steps_of_epoch(config.train, plan, epoch) for epoch in epochs)
    num_steps = warmup.num_steps + of_epochs
    return warmup.model_copy(update={"num_epochs": 0, "num_steps": num_steps})


def batch_plan(dataset: Dataset, config: RunConfig, seed: int) -> BatchPlan:
    """Which samples make which step. Raises InputError where the data set's own order is none."""
    data = config.data
    if isinstance(dataset, Streamed):
        return _stream_plan(dataset, config, seed)
    order = own_order(dataset, seed)
    if order is not None:
        if data.batch_tokens is not None:
            raise ConfigError(
                f"data.batch_tokens = {data.batch_tokens} orders an epoch by lengths, and "
                f"{type(dataset).__name__} gives an order of its own: use data.batch_size"
            )
        return OwnOrderPlan(order, data.batch_size, data.should_drop_last)
    if data.batch_tokens is None:
        permuted = own_permutation(dataset)
        return FixedSizePlan(len(dataset), data.batch_size, data.should_drop_last, seed, permuted)
    lengths = getattr(dataset, "lengths", None)
    if lengths is None:
        raise ConfigError(
            f"data.batch_tokens = {data.batch_tokens} needs a data set that knows the lengths of "
            f"its items; {type(dataset).__name__} has no attribute 'lengths': use data.batch_size"
        )
    return TokenPlan(lengths, data.batch_tokens, seed)


def _stream_plan(dataset: Streamed, config: RunConfig, seed: int) -> BatchPlan:
    """The batches of a stream, as they come. Raises ConfigError for what needs its length."""
    name = type(dataset.source).__name__
    if config.train.steps_per_epoch is None:
        raise ConfigError(
            f"{name} is a stream and has no length: say how many steps an epoch has with "
            f"train.steps_per_epoch"
        )
    if config.data.batch_tokens is not None or config.distributed.strategy != "none":
        key = "data.batch_tokens" if config.data.batch_tokens else "distributed.strategy"
        raise ConfigError(
            f"{name} is a stream, which one process reads item by item, and {key} is set: leave "
            f"it out, or take stream files (holdfast.StreamFiles)"
        )
    return FixedSizePlan(
        ENDLESS, config.data.batch_size, False, seed, lambda _: lambda place: place
    )


def restore(stage: Stage, manager: CheckpointManager, state: TrainState) -> int:
    """Put back the newest good checkpoint, if there is one. Returns the step.

    Raises CheckpointNotFoundError where a fork has lost the one that it began with.
    """
    restored = manager.restore(
        should_allow_mismatch=stage.arguments.should_allow_mismatch,
        validate=validate_state,
        device=device_reader(state.loss_sum.device),
    )
    if restored is not None:
        forked = stage.record.lineage
        is_its_begin = forked is not None and restored.manifest.step == forked.step
        state.restore(restored.tensors, restored.state, forked if is_its_begin else None)
        stage.progress.emit("restored", step=state.counters.step, path=str(restored.path))
    elif (lineage := stage.record.lineage) is not None:
        raise CheckpointNotFoundError(
            f"{stage.run.path} is a fork that began with step {lineage.step} of {lineage.run_id}, "
            f"and has no checkpoint any more: fork again under another run id"
        )
    return state.counters.step
