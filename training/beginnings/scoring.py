"""The metrics of one checkpoint on validation data. Nothing of the run is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from holdfast.training.beginnings.choosing import chosen_checkpoint, read_checkpoint
from holdfast.training.checkpointing.loading import load_weights
from holdfast.training.exactness.seeding import seed_generators
from holdfast.training.experiment.protocol import Records
from holdfast.training.loop.evaluation import evaluate, metrics_of, num_samples
from holdfast.training.loop.experiment_state import experiment_checkpoint, restore_experiment
from holdfast.training.loop.train_step import resolve_device
from holdfast.training.stage import NoticeCameError, StageArguments, prepared_stage
from holdfast.training.weights.frozen import load_saved


@dataclass(frozen=True)
class Score:
    """What one checkpoint is worth.

    Attributes:
        kind: ``full`` or ``weights``.
        metrics: found now.
        recorded: found when it was saved, at the end of an epoch; else empty.
    """

    run_id: str
    step: int
    epoch: int
    kind: str
    num_samples: int
    metrics: dict[str, float]
    recorded: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "split": "validation"}


class _Told:
    """Tells how many samples are scored, and keeps none."""

    def __init__(self, total: int, on_samples: Callable[[int, int], None]) -> None:
        self._total = total
        self._on_samples = on_samples

    def load(self) -> None:
        """There are none."""

    def offer(self, parts: Sequence[Records], is_last: bool) -> None:  # noqa: ARG002
        """Tell."""
        self._on_samples(sum(num_samples(part) for part in parts), self._total)


def score(
    arguments: StageArguments, at: str, on_samples: Callable[[int, int], None] = lambda *_: None
) -> Score:
    """Score the weights of a checkpoint on validation data, as training does at ends of epochs.

    Args:
        arguments: of its run.
        at: a step, ``best`` or ``latest``.
        on_samples: told how many samples of how many are scored.

    Raises:
        InputError: there is no such run or checkpoint.
        CheckpointCorruptError, StorageError: it cannot be read.
        NoticeCameError: a signal came first.
    """
    with prepared_stage(replace(arguments, is_resume=True, progress_format="none")) as stage:
        run, experiment, config = stage.run, stage.experiment, stage.config
        manifest = chosen_checkpoint(run, at, config)
        path, newest = run.checkpoint(manifest.step), experiment_checkpoint(run)
        full = path if manifest.kind == "full" else newest
        read_checkpoint(path)
        if full is not None and full != path:
            read_checkpoint(full)
        weights = load_weights(path)
        restore_experiment(experiment, full)
        seed_generators(stage.seed("model"))
        model = experiment.model()
        load_saved(model, weights, config.checkpoint, full)
        dataset = experiment.dataset("validation")
        records = evaluate(
            experiment,
            model.to(resolve_device(config.train.device)),
            dataset,
            batch_size=config.data.evaluation_batch_size,
            should_stop=stage.should_stop,
            kept=_Told(len(dataset), on_samples),
        )
        if records is None:
            raise NoticeCameError(stage.monitor.notice)
        metrics = metrics_of(experiment, records)
    return Score(
        stage.record.run_id,
        manifest.step,
        manifest.epoch,
        manifest.kind,
        num_samples(records),
        metrics,
        dict(manifest.metrics),
    )
