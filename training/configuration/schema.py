"""The configuration of a run: frozen, strict, typed.

Values come from four places, later ones win: the defaults below, the experiment's own
defaults, a TOML file, and ``section.key=value`` overrides. An unknown key, or a value out of
range, is a ``ConfigError`` that names the key, what was found and what is allowed.

The digest of a configuration covers what changes the result. Fields marked with
``OUTSIDE_DIGEST`` (folders, loader workers, when to save, logging) may differ between the
segments of one run. A field that was added after the first release and changes the result is marked
with ``UNLESS_DEFAULT``: at its default it is no part of the digest, so that the runs of before keep
theirs. One marked with ``UNLESS_SHARDED`` is left out, too, where ``num_shards`` is set, and it
changes nothing any more; with ``UNLESS_SHARDED_ALIKE``, unless it has the value that does. Those
marked with ``CHOICE_ONLY`` are covered, and yet may be changed in a run that was begun: they change
which weights win among those that training left, not the training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

OUTSIDE_DIGEST: dict[str, Any] = {"digest": "no"}
UNLESS_DEFAULT: dict[str, Any] = {"digest": "unless default"}
UNLESS_SHARDED: dict[str, Any] = {"digest": "unless default", "unless_set": "num_shards"}
UNLESS_SHARDED_ALIKE: dict[str, Any] = {**UNLESS_SHARDED, "unless_value": "fsdp"}
CHOICE_ONLY: dict[str, Any] = {"choice": True}

MAX_TIME_S = 366 * 24 * 3600
MAX_PRICE = 1e12
MAX_LEASE_S = 24 * 3600  # nobody can take over a run whose holder vanished before it has passed

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Split = Literal["train", "validation", "test"]
"""Which part of the data."""
Mode = Literal["min", "max"]
"""Whether small or large values of a metric are good."""


class Ranking(NamedTuple):
    """By which validation metric, and in which direction, something is called better."""

    metric: str
    mode: Mode


class Section(BaseModel):
    """One table of the configuration file. Experiments derive their settings from it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class DataConfig(Section):
    """What is read, and how it is cut into batches."""

    folder: Path | None = Field(None, json_schema_extra=OUTSIDE_DIGEST)
    """Folder that holds the experiment's data files."""
    batch_size: int = Field(64, ge=1)
    """Samples of one step, all its microbatches together."""
    batch_tokens: int | None = Field(None, ge=1)
    """Tokens of one step; replaces batch_size where the data set knows its lengths."""
    evaluation_batch_size: int = Field(256, ge=1)
    """Samples of one evaluation batch."""
    should_drop_last: bool = False
    """Drop the last, smaller batch of an epoch."""
    num_workers: int = Field(0, ge=0, le=256, json_schema_extra=OUTSIDE_DIGEST)
    """Loader processes; 0 loads in the training process. Never changes the result."""
    has_persistent_workers: bool = Field(True, json_schema_extra=OUTSIDE_DIGEST)
    """Keep loader processes from one epoch to the next."""
    prefetch_factor: int = Field(2, ge=1, json_schema_extra=OUTSIDE_DIGEST)
    """Microbatches that each loader process prepares ahead."""


class TrainConfig(Section):
    """How long and with what arithmetic."""

    num_epochs: int = Field(10, ge=1)
    """Epochs to train: passes over the training data, or parts of `steps_per_epoch` steps."""
    steps_per_epoch: int | None = Field(None, ge=1, json_schema_extra=UNLESS_DEFAULT)
    """Steps of an epoch, whatever the size of the data: the samples go on in the order of their
    passes. Unset: an epoch is one pass. Whatever counts epochs counts these."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, even within an epoch."""
    num_microbatches: int = Field(1, ge=1)
    """Parts that a step's batch is cut into; their gradients are accumulated."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest L2 norm of all gradients together."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of forward and loss; fp16 scales the loss and needs a GPU."""
    should_compile: bool = False
    """Compile the model with torch.compile."""
    mode: Literal["deterministic", "speed"] = "deterministic"
    """`speed` allows nondeterministic kernels: faster on some models, no exact resume."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU where there is one."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of torch. Unset: OMP_NUM_THREADS, or all cores, of the first segment."""
    hang_timeout_s: float | None = Field(
        None, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST
    )
    """A training of one process that does nothing new for so long (a step, a batch of a validation)
    hangs: where each thread stands is written down, and it is killed, which counts as a crash.
    Longer than a save and a step take; until the first step is done it is at least ten minutes.
    Unset: nobody watches. Several processes have `distributed.hang_timeout_s`."""
    initial_weights: Path | None = Field(None, json_schema_extra=OUTSIDE_DIGEST)
    """What `model()` begins with: a safetensors file, a checkpoint or bundle of ours, or a torch
    file. Its content is part of the run's identity, wherever the file lies."""
    initial_weights_names: dict[str, str] = Field(
        default_factory=dict, json_schema_extra=UNLESS_DEFAULT
    )
    """Beginnings of names in that file, and what to put in their place."""
    should_take_all_weights: bool = Field(True, json_schema_extra=UNLESS_DEFAULT)
    """Refuse `initial_weights` that lack a tensor of the model, or hold one that it has not;
    `false` takes what fits."""


class DistributedConfig(Section):
    """Several processes of one training, on one machine or on several."""

    strategy: Literal["none", "ddp", "fsdp"] = Field("none", json_schema_extra=UNLESS_SHARDED_ALIKE)
    """`ddp`: each process has all weights, and computes the gradient of its part of each step.
    `fsdp`: weights, gradients, optimizer and averages lie in slices on the processes."""
    num_processes: int = Field(1, ge=1, le=1024, json_schema_extra=UNLESS_SHARDED)
    """How many on each machine. May differ from segment to segment where `num_shards` is set."""
    min_machines: int = Field(1, ge=1, le=1024, json_schema_extra=OUTSIDE_DIGEST)
    """A start waits until so many machines are there: the one that starts the run, and those where
    `holdfast join` waits for it."""
    max_machines: int = Field(1, ge=1, le=1024, json_schema_extra=UNLESS_SHARDED)
    """So many train together at most. May differ from segment to segment where `num_shards` is
    set."""
    machines_wait_s: float = Field(10.0, ge=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """How long a start waits for more machines once `min_machines` are there."""
    grow_after_s: float | None = Field(60.0, ge=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """A machine that comes while others train is taken in by a new start, once these have trained
    for so long. Unset: it waits until they start again for another reason."""
    num_shards: int | None = Field(None, ge=1, le=2**16, json_schema_extra=UNLESS_DEFAULT)
    """Equal parts of a step's batch whose gradients are computed by themselves, and added up in one
    fixed order: the bytes are the same for any number of processes up to it; with `fsdp`, for
    powers of two that divide it."""
    should_allow_other_num_processes: bool = Field(False, json_schema_extra=OUTSIDE_DIGEST)
    """Without `num_shards`: go on with another number of processes than the run was begun with. The
    result is not that of a run without interruptions."""
    hang_timeout_s: float = Field(600.0, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """Processes that do nothing new for so long (a step, a batch of an evaluation) hang: where they
    stand is written down, and all are killed. Longer than a save and a step take; until the first
    step is done it is at least ten minutes."""

    @property
    def num_parts(self) -> int:
        """Parts of a step's batch: shards, or one for each process."""
        return self.num_shards or self.num_processes * self.max_machines

    def num_machines_of(self, num_there: int) -> int | None:
        """How many of the machines that are there train together; None where they are too few."""
        numbers = range(min(num_there, self.max_machines), self.min_machines - 1, -1)
        return next((number for number in numbers if self._is_width(number)), None)

    def _is_width(self, num_machines: int) -> bool:
        """Whether so many machines go with the shards: in slices, all go through them together."""
        size = num_machines * self.num_processes
        if self.strategy != "fsdp" or self.num_shards is None:
            return size <= self.num_parts
        return size & (size - 1) == 0 and self.num_shards % size == 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._require_strategy()
        self._require_range()
        size = self.num_processes * self.max_machines
        if size > self.num_parts:
            on_each = f" on each of max_machines={self.max_machines}" * (self.max_machines > 1)
            raise ValueError(
                f"num_processes={self.num_processes}{on_each} is more than "
                f"num_shards={self.num_shards}: a process needs at least one shard; use at most "
                f"{self.num_shards} processes"
            )
        if self.strategy == "fsdp" and self.num_shards is not None:
            self._require_equal_shards(self.num_shards)
        return self

    def _require_strategy(self) -> None:
        if self.strategy != "none":
            return
        for key in ("num_processes", "num_shards", "max_machines"):
            value = getattr(self, key)
            if value not in (1, None) or (key == "num_shards" and value is not None):
                raise ValueError(f"{key}={value} needs a strategy: write distributed.strategy=ddp")

    def _require_range(self) -> None:
        least, most = self.min_machines, self.max_machines
        if least > most:
            raise ValueError(
                f"min_machines={least} is more than max_machines={most}: write a range, such as "
                f"min_machines=1 and max_machines={least}"
            )
        if least < most and self.num_shards is None:
            raise ValueError(
                f"min_machines={least} and max_machines={most} need num_shards: without it, the "
                f"number of processes is part of the run; set num_shards, or write "
                f"min_machines={most}"
            )

    def _require_equal_shards(self, num_shards: int) -> None:
        """With slices all processes go through the shards together."""
        if self.num_machines_of(self.max_machines) is None:
            most = num_shards & -num_shards
            on_each = f" on {self.min_machines} to {self.max_machines} machines"
            raise ValueError(
                f"num_processes={self.num_processes}{on_each * (self.max_machines > 1)} does not "
                f"go with num_shards={num_shards} and strategy=fsdp: use a power of two that "
                f"divides num_shards, up to {most} processes"
            )


class OptimizerConfig(Section):
    """An optimizer of torch.optim, or your own."""

    name: str = "AdamW"
    """Class name in torch.optim, or `package.module:Class`."""
    args: dict[str, Any] = Field(default_factory=lambda: {"lr": 1e-3})
    """Keyword arguments of its constructor."""


class SchedulerConfig(Section):
    """A learning rate scheduler of torch.optim.lr_scheduler, or your own."""

    name: str | None = None
    """Class name in torch.optim.lr_scheduler, InverseSquareRoot, or `package.module:Class`; unset:
    constant rate. ChainedScheduler and SequentialLR take a list of tables with `name` and `args`
    as `scheduler.args.schedulers`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""
    interval: Literal["epoch", "step"] = "epoch"
    """How often it is stepped: after each epoch's validation, or after each step.
    ReduceLROnPlateau is stepped after each epoch's validation."""
    metric: str = "loss"
    """Validation metric that ReduceLROnPlateau watches."""
    optimizers: tuple[str, ...] = Field((), json_schema_extra=UNLESS_DEFAULT)
    """Of several optimizers, those that scheduler and warm-up move; empty: all."""


class WarmupConfig(Section):
    """Linear warm-up of the learning rate before the scheduler takes over."""

    num_epochs: int = Field(0, ge=0)
    """Length in epochs."""
    num_steps: int = Field(0, ge=0)
    """Length in steps; added to the epochs."""
    start_factor: float = Field(0.1, gt=0, le=1)
    """Fraction of the learning rate at the first step."""


class EarlyStoppingConfig(Section):
    """Stop when validation no longer improves."""

    patience_epochs: int | None = Field(None, ge=1)
    """Epochs without an improvement after which training stops; unset never stops."""
    min_delta: float = Field(0.0, ge=0)
    """Smallest change that counts as an improvement."""
    metric: str | None = Field(None, json_schema_extra=UNLESS_DEFAULT)
    """Validation metric that is watched. Unset: `selection.metric`."""
    mode: Mode | None = Field(None, json_schema_extra=UNLESS_DEFAULT)
    """Whether small or large values of `metric` are good; to be set with it."""


class EmaConfig(Section):
    """Exponential moving averages of the weights, kept in fp32."""

    decays: tuple[float, ...] = (0.999,)
    """One average per decay, each in [0, 1)."""
    has_warmup: bool = True
    """Use min(decay, (1 + step) / (10 + step)), so that early weights are forgotten."""
    posthoc_gammas: tuple[float, ...] = ()
    """Exponents of power-function tracks (Karras et al. 2024); 16.97 and 6.94 are usual."""
    posthoc_snapshot_epochs: int = Field(1, ge=1)
    """A snapshot of the power-function tracks is kept every so many epochs."""
    posthoc_widths: tuple[float, ...] = Field((0.05, 0.1, 0.15), json_schema_extra=CHOICE_ONLY)
    """Averages to reconstruct after training, each by its standard deviation as a fraction of the
    training's length, in (0, 0.28]."""
    posthoc_max_error: float = Field(0.1, gt=0, lt=1, json_schema_extra=CHOICE_ONLY)
    """Largest distance of a reconstructed profile from the wanted one, relative to that one."""

    @field_validator("decays", "posthoc_gammas", "posthoc_widths")
    @classmethod
    def _differ(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) != len(values):
            raise ValueError("the values must differ from each other")
        return values

    @field_validator("decays")
    @classmethod
    def _decays_in_range(cls, decays: tuple[float, ...]) -> tuple[float, ...]:
        for decay in decays:
            if not 0.0 <= decay < 1.0:
                raise ValueError(f"each must lie in [0, 1), found {decay}")
        return decays

    @field_validator("posthoc_gammas")
    @classmethod
    def _gammas_in_range(cls, gammas: tuple[float, ...]) -> tuple[float, ...]:
        for gamma in gammas:
            if not gamma > 0:
                raise ValueError(f"each must be above 0, found {gamma}")
        return gammas

    @field_validator("posthoc_widths")
    @classmethod
    def _widths_in_range(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        for width in widths:
            if not 0.0 < width <= 0.28:
                raise ValueError(f"each must lie in (0, 0.28], found {width}")
        return widths


class CheckpointConfig(Section):
    """When to save what a resume needs, and how many to keep."""

    every_steps: int | None = Field(None, ge=1, json_schema_extra=OUTSIDE_DIGEST)
    """Save every so many steps."""
    every_s: float | None = Field(None, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """Save when this many seconds have passed since the last save."""
    every_epochs: int = Field(1, ge=1)
    """Save after every so many epochs. Selection chooses among these, so this one is part of the
    digest."""
    weights_every_steps: int | None = Field(None, ge=1, json_schema_extra=UNLESS_DEFAULT)
    """Validate, and save a light checkpoint, after every so many steps: weights and averages alone,
    which selection may choose and no resume begins with."""
    weights_every_epochs: int | None = Field(None, ge=1, json_schema_extra=UNLESS_DEFAULT)
    """Save a light checkpoint after every so many epochs where `every_epochs` saves none."""
    is_auto: bool = Field(True, json_schema_extra=OUTSIDE_DIGEST)
    """Also save at the interval of Young and Daly, from the measured cost of a save."""
    mean_time_between_preemptions_s: float = Field(
        3600.0, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST
    )
    """What `is_auto` assumes until the run's own segments tell."""
    max_overhead: float = Field(0.01, gt=0, le=1, json_schema_extra=OUTSIDE_DIGEST)
    """Largest fraction of time that `is_auto` spends saving."""
    should_overlap: bool = Field(True, json_schema_extra=OUTSIDE_DIGEST)
    """On a GPU, copy weights, optimizer and averages beside the next forward and backward pass."""
    keep_last: int = Field(2, ge=1, json_schema_extra=OUTSIDE_DIGEST)
    """Newest checkpoints to keep in full."""
    keep_every_steps: int | None = Field(None, ge=1, json_schema_extra=OUTSIDE_DIGEST)
    """Keep each checkpoint whose step is a multiple of this, for the archive."""
    keep_above: dict[str, float] = Field(default_factory=dict, json_schema_extra=OUTSIDE_DIGEST)
    """Save, and keep, at the end of the first epoch whose metric reached this value from below.
    Selection does not choose what was saved for this alone."""
    keep_below: dict[str, float] = Field(default_factory=dict, json_schema_extra=OUTSIDE_DIGEST)
    """The same, from above."""
    frozen: Literal["kept", "left_out"] = Field("kept", json_schema_extra=UNLESS_DEFAULT)
    """Parameters that `model()` returns frozen: kept in checkpoints and averages, or left out of
    them and held to a digest."""
    max_metric_change: float = Field(0.02, ge=0, json_schema_extra=OUTSIDE_DIGEST)
    """Where another machine or other libraries go on, the last validation is repeated: largest
    relative change of `selection.metric` that is accepted."""


class SelectionConfig(Section):
    """Which weights win."""

    metric: str = "loss"
    """Validation metric that decides."""
    mode: Mode = "min"
    """Whether small or large values of it are good."""
    top_k: int = Field(5, ge=1)
    """Best checkpoints to keep as weights for averaging."""
    top_k_metric: str | None = Field(None, json_schema_extra=UNLESS_DEFAULT)
    """Validation metric that those are the best by. Unset: `metric`."""
    top_k_mode: Mode | None = Field(None, json_schema_extra=UNLESS_DEFAULT)
    """Whether small or large values of `top_k_metric` are good; to be set with it."""
    candidates: tuple[Literal["ema", "posthoc", "average", "weighted", "soup", "ensemble"], ...] = (
        Field(("ema", "posthoc", "average", "weighted", "soup"), json_schema_extra=CHOICE_ONLY)
    )
    """Averages to make besides the best and the last checkpoint. An `ensemble` holds the best
    `top_k` checkpoints and takes as many times the memory and the time."""
    should_recompute_batch_norm: bool = Field(True, json_schema_extra=CHOICE_ONLY)
    """Measure averaged candidates also with batch norm statistics recomputed on training data."""
    batch_norm_steps: int = Field(200, ge=1, json_schema_extra=CHOICE_ONLY)
    """Steps' worth of training data to recompute them on, of one epoch at most."""
    num_bootstrap: int = Field(2000, ge=100, json_schema_extra=CHOICE_ONLY)
    """Resamples of the test set for the interval of the metric."""
    save_every_s: float = Field(5.0, ge=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """What was measured is saved after so many seconds, less often where saving takes long."""

    @property
    def ranking(self) -> Ranking:
        """What decides."""
        return Ranking(self.metric, self.mode)

    @property
    def top_k_ranking(self) -> Ranking:
        """What the best ``top_k`` checkpoints are the best by."""
        return _ranking(self.top_k_metric, self.top_k_mode, self.ranking)


class PreemptionConfig(Section):
    """Which notices are listened to. Never changes the result."""

    grace_period_s: float = Field(30.0, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """Seconds from a signal to the machine's end."""
    sources: tuple[Literal["signal", "slurm", "sentinel", "aws", "gcp", "azure"], ...] = Field(
        ("signal", "slurm"), json_schema_extra=OUTSIDE_DIGEST
    )
    """Where notices come from."""
    max_wall_time_s: float | None = Field(
        None, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST
    )
    """Stop, saved, after this many seconds of one segment."""
    sentinel_file: Path | None = Field(None, json_schema_extra=OUTSIDE_DIGEST)
    """A file whose appearance is a notice, as a container's preStop hook writes it."""
    poll_interval_s: float = Field(2.0, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """Seconds between two questions to a metadata service."""
    metadata_url: str | None = Field(None, json_schema_extra=OUTSIDE_DIGEST)
    """Base address of the metadata service; unset takes the cloud's own."""
    lease_ttl_s: float = Field(8.0, gt=0, le=MAX_LEASE_S, json_schema_extra=OUTSIDE_DIGEST)
    """A lease that was not renewed for this long may be taken over."""


class LoggingConfig(Section):
    """What is told while training. Never changes the result."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", json_schema_extra=OUTSIDE_DIGEST
    )
    """Least severe message that is shown."""
    every_s: float = Field(5.0, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """Seconds between two progress lines."""
    tensorboard: bool = Field(False, json_schema_extra=OUTSIDE_DIGEST)
    """Write TensorBoard event files into the run directory."""


class TrackingConfig(Section):
    """Trackers that a run is sent to, by a process of its own. Never changes the result."""

    to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (), json_schema_extra=OUTSIDE_DIGEST
    )
    """Which: event files in the run directory; the MLflow server of MLFLOW_TRACKING_URI; Weights &
    Biases, offline unless WANDB_API_KEY or WANDB_MODE says otherwise."""
    project: str | None = Field(None, min_length=1, json_schema_extra=OUTSIDE_DIGEST)
    """MLflow's experiment, W&B's project. Unset: the experiment's name."""
    timeout_s: float = Field(60.0, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """How long a completed training waits until trackers have got the rest."""


class ExportConfig(Section):
    """What is exported from the champion, and what it must prove. Never changes the training."""

    formats: tuple[
        Literal["weights", "onnx", "torchscript", "exported_program", "onnx_int8"], ...
    ] = Field(
        ("weights", "onnx", "torchscript", "exported_program"), json_schema_extra=OUTSIDE_DIGEST
    )
    """Artifacts of the bundle; `weights` is always made, and `onnx` where `onnx_int8` is. Without
    `onnx` a bundle cannot be run by its own verify.py, Triton or MLflow."""
    max_batch_size: int = Field(4096, ge=2, json_schema_extra=OUTSIDE_DIGEST)
    """Largest batch that a server may send to the exported model."""
    num_golden: int = Field(8, ge=1, json_schema_extra=OUTSIDE_DIGEST)
    """Validation samples that travel with the bundle, for checks on the consumer's machine."""
    num_calibration: int = Field(256, ge=1, json_schema_extra=OUTSIDE_DIGEST)
    """Training samples that the ranges of int8 activations are measured on."""
    int8_metric: str | None = Field(None, json_schema_extra=OUTSIDE_DIGEST)
    """Test metric that int8 is held to; unset takes `selection.metric`."""
    int8_max_metric_change: float = Field(0.02, ge=0, json_schema_extra=OUTSIDE_DIGEST)
    """Largest relative change of that metric that int8 may cause."""
    int8_min_agreement: float = Field(0.98, ge=0, le=1, json_schema_extra=OUTSIDE_DIGEST)
    """Smallest fraction of test samples that int8 puts into the champion's class."""
    num_latency_runs: int = Field(100, ge=10, json_schema_extra=OUTSIDE_DIGEST)
    """Timed calls of each artifact and batch size."""
    timeout_s: float = Field(1800.0, gt=0, le=MAX_TIME_S, json_schema_extra=OUTSIDE_DIGEST)
    """A check that takes longer counts as failed."""
    licence: str = Field("apache-2.0", min_length=1, json_schema_extra=OUTSIDE_DIGEST)
    """Licence of the weights, as the model card states it."""


class PromotionConfig(Section):
    """When a new champion takes an alias of the registry. Never changes the training."""

    metric: str | None = Field(None, json_schema_extra=OUTSIDE_DIGEST)
    """Test metric that is compared; unset takes `selection.metric` and its mode."""
    mode: Literal["min", "max"] = Field("min", json_schema_extra=OUTSIDE_DIGEST)
    """Whether small or large values of `metric` are good, where it is set."""
    max_worsening: float = Field(0.02, ge=0, json_schema_extra=OUTSIDE_DIGEST)
    """Fraction of the holder's metric by which the new one may be worse, with confidence."""
    confidence: float = Field(0.95, gt=0.5, lt=1, json_schema_extra=OUTSIDE_DIGEST)
    """One-sided confidence with which a larger worsening must be ruled out."""
    num_bootstrap: int = Field(2000, ge=100, json_schema_extra=OUTSIDE_DIGEST)
    """Paired resamples of the test data."""


class SpikesConfig(Section):
    """What is done about a loss that is not finite or jumps: nothing, or back, and past it."""

    num_left_out: int | None = Field(None, ge=1, json_schema_extra=UNLESS_DEFAULT)
    """Steps to leave out, up to the one with the spike: training goes back before them, and on
    without their batches. Unset: a loss that is not finite fails the run, and jumps are not looked
    for. Fewer than the steps of an epoch."""
    max_jump: float | None = Field(None, ge=1, json_schema_extra=UNLESS_DEFAULT)
    """A loss above so many times the mean of those before is a spike. Unset: only one that is not
    finite is."""
    window_steps: int = Field(100, ge=1, json_schema_extra=UNLESS_DEFAULT)
    """Length of that mean; before there are so many losses none is a jump."""
    max_rollbacks: int = Field(3, ge=1, json_schema_extra=OUTSIDE_DIGEST)
    """Spikes after which the run fails."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_jump is not None and self.num_left_out is None:
            raise ValueError(
                f"max_jump={self.max_jump:g} finds jumps, and num_left_out says how many steps are "
                f"left out for one: set it, too"
            )
        return self


class PricesConfig(Section):
    """What machines cost, for the report and `holdfast simulate`. Never changes the result."""

    spot_per_hour: float | None = Field(None, gt=0, le=MAX_PRICE, json_schema_extra=OUTSIDE_DIGEST)
    """Price of an hour of the machine that trains; it is paid while a segment lives."""
    on_demand_per_hour: float | None = Field(
        None, gt=0, le=MAX_PRICE, json_schema_extra=OUTSIDE_DIGEST
    )
    """Price of an hour of one that is never taken away, to compare with."""
    currency: str = Field(
        "USD", min_length=1, max_length=8, pattern=r"^\S+$", json_schema_extra=OUTSIDE_DIGEST
    )
    """What the prices are in, as it is shown."""

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.on_demand_per_hour is not None and self.spot_per_hour is None:
            raise ValueError(
                "on_demand_per_hour is compared with spot_per_hour, which is not set: set both"
            )
        return self


class RehearsalConfig(Section):
    """What is tried on throw-away objects before the first step. Never changes the result."""

    depth: Literal["none", "step", "export"] | None = Field(None, json_schema_extra=OUTSIDE_DIGEST)
    """How much is tried: nothing; training, saving and validation; exports as well. Unset:
    the variable HOLDFAST_REHEARSAL_DEPTH, or `export`."""
    max_s: float = Field(120.0, gt=0, json_schema_extra=OUTSIDE_DIGEST)
    """Seconds after which it ends; what was left out then is told."""


class RunConfig(Section):
    """Everything that is configured about one run.

    ``experiment`` holds the settings of the experiment; the experiment's own class validates them.
    """

    seed: int = Field(0, ge=0, lt=2**63)
    """Root of every random number."""
    experiment: dict[str, Any] = Field(default_factory=dict)
    """Settings of the experiment; its own class `Settings` names and documents them."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    warmup: WarmupConfig = WarmupConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    selection: SelectionConfig = SelectionConfig()
    preemption: PreemptionConfig = PreemptionConfig()
    logging: LoggingConfig = LoggingConfig()
    tracking: TrackingConfig = TrackingConfig()
    export: ExportConfig = ExportConfig()
    promotion: PromotionConfig = PromotionConfig()
    spikes: SpikesConfig = SpikesConfig()
    prices: PricesConfig = PricesConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()

    @property
    def early_stopping_ranking(self) -> Ranking:
        """What early stopping watches."""
        stopping = self.early_stopping
        return _ranking(stopping.metric, stopping.mode, self.selection.ranking)

    @property
    def ranking_metrics(self) -> dict[str, str]:
        """The validation metrics that checkpoints are ranked by, by the keys that name them."""
        named = {
            "selection.metric": self.selection.metric,
            "selection.top_k_metric": self.selection.top_k_metric,
            "early_stopping.metric": self.early_stopping.metric,
        }
        return {key: name for key, name in named.items() if name is not None}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        selection, stopping = self.selection, self.early_stopping
        _require_mode(
            "selection.top_k_", selection.top_k_metric, selection.top_k_mode, selection.metric
        )
        _require_mode("early_stopping.", stopping.metric, stopping.mode, selection.metric)
        self._require_light_saves()
        if self.spikes.num_left_out is not None and self.distributed.strategy != "none":
            raise ValueError(
                f"spikes.num_left_out={self.spikes.num_left_out} is for a training of one process: "
                f"write distributed.strategy=none, or leave it out"
            )
        if self.data.batch_tokens is None and self.train.num_microbatches > self.data.batch_size:
            raise ValueError(
                f"train.num_microbatches={self.train.num_microbatches} is more than "
                f"data.batch_size={self.data.batch_size}; a microbatch needs at least one sample"
            )
        self._require_whole_shards()
        self._require_equal_passes()
        snapshot_epochs, every_epochs = (
            self.ema.posthoc_snapshot_epochs,
            self.checkpoint.every_epochs,
        )
        saved = (every_epochs, self.checkpoint.weights_every_epochs or every_epochs)
        if self.ema.posthoc_gammas and all(snapshot_epochs % every for every in saved):
            raise ValueError(
                f"ema.posthoc_snapshot_epochs={snapshot_epochs} must be a multiple of "
                f"checkpoint.every_epochs={every_epochs}: snapshots are kept in checkpoints"
            )
        return self

    def _require_whole_shards(self) -> None:
        num_parts, batch_size = self.distributed.num_parts, self.data.batch_size
        key = "num_shards" if self.distributed.num_shards else "num_processes"
        if self.data.batch_tokens is None and num_parts * self.train.num_microbatches > batch_size:
            microbatches = f" of train.num_microbatches={self.train.num_microbatches} each"
            microbatches = "" if self.train.num_microbatches == 1 else microbatches
            raise ValueError(
                f"distributed.{key}={num_parts} parts{microbatches} are more than "
                f"data.batch_size={batch_size} samples; each needs at least one"
            )

    def _require_equal_passes(self) -> None:
        """With slices every process takes part in every pass, so that all have as many."""
        if self.distributed.strategy != "fsdp":
            return
        wrong = {
            "data.should_drop_last=false": not self.data.should_drop_last,
            "data.batch_tokens": self.data.batch_tokens is not None,
            "train.should_compile=true": self.train.should_compile,
            "checkpoint.frozen=left_out": self.checkpoint.frozen == "left_out",
        }
        for key in (key for key, is_wrong in wrong.items() if is_wrong):
            raise ValueError(
                f"{key} does not go with distributed.strategy=fsdp, in which all processes do the "
                f"same passes over their own slices: write data.should_drop_last=true, and leave "
                f"the others as they are by default"
            )

    def _require_light_saves(self) -> None:
        light, every_epochs = self.checkpoint.weights_every_epochs, self.checkpoint.every_epochs
        if light is not None and light % every_epochs == 0:
            raise ValueError(
                f"checkpoint.weights_every_epochs={light} saves nothing that "
                f"checkpoint.every_epochs={every_epochs} does not save in full: leave it out, or "
                f"raise checkpoint.every_epochs"
            )


def _ranking(metric: str | None, mode: Mode | None, otherwise: Ranking) -> Ranking:
    """A ranking by a metric of its own; where its mode is not said, ``_require_mode`` knows it."""
    if metric is None:
        return otherwise
    return Ranking(metric, mode or (otherwise.mode if metric == otherwise.metric else "min"))


def _require_mode(prefix: str, metric: str | None, mode: Mode | None, usual: str) -> None:
    """Raise ValueError where a metric of its own does not say which direction is good."""
    if metric is None and mode is not None:
        raise ValueError(
            f"{prefix}mode = {mode!r} belongs to {prefix}metric, which is not set: set both, or "
            f"leave it out"
        )
    if metric not in (None, usual, "loss") and mode is None:
        raise ValueError(
            f"{prefix}metric = {metric!r}: is more of it better, or less? Say so with "
            f"{prefix}mode=max or {prefix}mode=min"
        )
    if metric == "loss" and mode == "max":
        raise ValueError(
            f"{prefix}mode = 'max' would prefer the largest loss: training makes it small; write "
            f"{prefix}mode=min, or name the metric that is meant in {prefix}metric"
        )
