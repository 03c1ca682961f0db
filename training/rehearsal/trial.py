"""A training to throw away, and what is tried on it."""

from __future__ import annotations

import copy
import gc
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from holdfast.training.averages.ensemble import require_one_graph
from holdfast.training.champion.batch_norm import recompute_batch_norm, training_batches
from holdfast.training.champion.bootstrap import units_of
from holdfast.training.checkpointing.json_state import decode
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.data.loader import Loader, Microbatch, whole_steps
from holdfast.training.errors import CheckpointMismatchError, ExperimentError, InputError
from holdfast.training.exactness.seeding import seed_generators
from holdfast.training.experiment.building import build_experiment
from holdfast.training.experiment.loading import load_experiment
from holdfast.training.experiment.model_call import call_form
from holdfast.training.loop.evaluation import evaluate, metrics_of
from holdfast.training.loop.segment import build_overlap, build_trainer
from holdfast.training.loop.trainer import Trainer
from holdfast.training.optimizers.schedule import named_metric
from holdfast.training.rehearsal.beside import differing_beside
from holdfast.training.rehearsal.captured import capture, differing, shown
from holdfast.training.rehearsal.cost import checkpoint_cost, cost_findings
from holdfast.training.rehearsal.few_rows import FewRows, require_picklable
from holdfast.training.rehearsal.hidden import (
    Fingerprints,
    hidden_state,
    module_state,
    own_attributes,
)
from holdfast.training.rehearsal.operators import naming_operators
from holdfast.training.rehearsal.repetition import Repeated, tell_differences, tensors_in
from holdfast.training.rehearsal.request import RehearsalRequest, tell
from holdfast.training.rehearsal.telling import Telling
from holdfast.training.runs.costs import Costs
from holdfast.training.stage import Stage, StageArguments, prepared_stage
from holdfast.training.weights.frozen import load_saved

Step = list[Microbatch]
LAST_BATCH = "; leave the last batch of an epoch out with data.should_drop_last=true"
FIXED_SHAPES = (
    "; a resume builds the model anew: give its parameters and buffers their shapes in the "
    "constructor, not in the first batch"
)


@dataclass
class Trial:
    """A training as a segment would build it.

    A first one trains two steps; a second one, of objects that are built anew, goes on from what
    the first one would have saved after one step. Only one of them lives at a time.
    """

    arguments: StageArguments
    request: RehearsalRequest
    telling: Telling
    stack: ExitStack

    def build(self) -> None:
        """Constructor, data sets, model, optimizer, scheduler."""
        self.stage = self.stack.enter_context(prepared_stage(self.arguments))
        asked = self.stage.config
        self.stage = replace(self.stage, config=_plain(asked))
        experiment = self.stage.experiment
        for split in ("train", "validation"):
            if len(experiment.dataset(split)) == 0:
                raise ExperimentError(
                    f"the split {split} has no samples; {type(experiment).__name__}.dataset must "
                    "return at least one"
                )
        if "ensemble" in asked.selection.candidates:
            require_one_graph(experiment, asked.checkpoint.frozen)
        self.trainer = build_trainer(self.stage, Costs())
        schedule, trainer = self.trainer.state.schedule, self.trainer
        schedule.require_length(trainer.num_steps(), trainer.epoch_ends())
        self._globals = self._module_state()
        if asked.data.num_workers:
            require_picklable(trainer.loader.dataset)
        if asked.train.should_compile:
            self.telling.find("note", "the model is compiled in the run alone, not here")

    def train(self) -> None:
        """Two steps; the first batch is fetched once more in between."""
        trainer = self.trainer
        begin = capture(trainer.state).digests()
        first = _step(trainer, 0)
        before = hidden_state(trainer.state.model, data_set=trainer.loader.dataset)
        naming_operators(lambda: trainer.train_step(copy.deepcopy(first)))
        trainer.train_step.guard.check()
        self._check_fetching(first, before)
        self.saved = capture(trainer.state)
        hidden = self._hidden(trainer, self.stage)
        second = _step(trainer, 1)
        start_s = time.monotonic()
        trainer.train_step(copy.deepcopy(second))
        trainer.train_step.guard.check()
        end = capture(trainer.state).digests()
        self.step_s = time.monotonic() - start_s
        self._repeated = Repeated(begin, end, hidden, second, self._changed_globals())

    def resume(self) -> None:
        """Objects built anew take up what was saved, and do the second step again."""
        self.trainer.loader.close()
        del self.trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        stage = replace(self.stage, experiment=self._fresh_experiment())
        self.trainer = trainer = build_trainer(stage, Costs())
        begin = capture(trainer.state).digests()
        self._restore(trainer)
        lost = differing(self.saved.digests(), capture(trainer.state).digests())
        if lost:
            self.telling.find(
                "error",
                f"what is restored is not what was saved: {shown(lost)} differ; state_dict() and "
                "load_state_dict() must give and take all that they hold",
            )
            return
        if _is_told_epochs(trainer.loader.dataset):
            _step(trainer, 0)  # as the first one was told before it was looked at
        hidden = self._hidden(trainer, stage)
        fetched = _step(trainer, 1)
        trainer.train_step(copy.deepcopy(self._repeated.batches))
        again = Repeated(
            begin, capture(trainer.state).digests(), hidden, fetched, self._changed_globals()
        )
        is_exact = self.stage.config.train.mode == "deterministic"
        tell_differences(self.telling, self._repeated, again, is_exact=is_exact)

    def compare_snapshots(self) -> None:
        """On a GPU: a snapshot beside the computation is the one that is taken at once."""
        trainer = self.trainer
        overlap = build_overlap(self.stage.config.checkpoint, trainer.state)
        if overlap is None:
            return
        batches = _step(trainer, 0)
        wrong = differing_beside(
            trainer.state, overlap, lambda: trainer.train_step(copy.deepcopy(batches))
        )
        if wrong:
            self.telling.find(
                "error",
                f"a checkpoint that is copied beside the computation is not what one copied at "
                f"once is: {shown(wrong)} differ; write checkpoint.should_overlap=false",
            )

    def validate(self) -> None:
        """The first and the last validation batches; what the end of an epoch does with them."""
        config, trainer = self.stage.config, self.trainer
        batch_size = config.data.evaluation_batch_size
        rows = FewRows.ends(trainer.validation, batch_size)
        records = evaluate(self.stage.experiment, trainer.state.model, rows, batch_size=batch_size)
        assert records is not None
        metrics = metrics_of(self.stage.experiment, records)
        for key, name in _metric_keys(config):
            named_metric(metrics, name, key)
        units_of(self.stage.experiment, records)
        trainer.state.schedule.after_epoch(metrics)
        capture(trainer.state)

    def recompute_batch_norm(self) -> None:
        """Statistics of averaged weights, on a few training batches."""
        config = self.stage.config
        if not config.selection.should_recompute_batch_norm:
            return
        selection = config.selection.model_copy(update={"batch_norm_steps": 2})
        stage = replace(self.stage, config=config.model_copy(update={"selection": selection}))
        model = copy.deepcopy(self.trainer.state.model)
        recompute_batch_norm(model, training_batches(stage), call_form(stage.experiment, model))

    def load_weights(self) -> None:
        """A fresh model takes weights alone, as candidates and exports have them."""
        seed_generators(self.stage.seed("model"))
        model = self.stage.experiment.model()
        state: Any = self.saved.state
        extra = decode(state["model"], self.saved.tensors["state"])
        weights = {**self.saved.tensors["model"], **extra}
        try:
            load_saved(model, weights, self.stage.config.checkpoint, None)
        except CheckpointMismatchError as error:
            message = str(error).partition(": use the settings")[0]
            raise CheckpointMismatchError(message) from error

    def train_last(self) -> None:
        """The last batch of an epoch, where it is smaller than the others."""
        trainer = self.trainer
        last = trainer.plan.num_steps(0) - 1
        sizes = [len(trainer.plan.indices(0, step)) for step in (0, last)]
        if last < 2 or sizes[0] == sizes[1]:
            return
        try:
            trainer.train_step(_step(trainer, last))
            trainer.train_step.guard.check()
        except InputError as error:
            self.telling.fail(error)
        except Exception as error:  # noqa: BLE001  # it worked with the first batch
            size = f"; the last batch of an epoch has {sizes[1]} samples, the others {sizes[0]}"
            self.telling.fail(error, size + LAST_BATCH)

    def fetch_later(self) -> None:
        """A later epoch's first batch, told after other epochs and alone, where it is told them."""
        trainer, last = self.trainer, min(2, self.stage.config.train.num_epochs - 1)
        if last < 1 or not _is_told_epochs(trainer.loader.dataset):
            return
        told = [_step(trainer, 0, epoch) for epoch in range(last + 1)]
        fresh = Loader(
            self._fresh_experiment().dataset("train"),
            trainer.plan,
            num_microbatches=self.stage.config.train.num_microbatches,
            seed=self.stage.seed("order"),
        )
        alone = _first_step(fresh, last, 0)
        if wrong := differing(tensors_in(told[-1]), tensors_in(alone)):
            self.telling.find(
                "warning",
                f"the first batch of epoch {last} is another one where the data set was told "
                f"set_epoch({last}) alone, as after a resume: {shown(wrong)} differ; what it gives "
                f"must depend on the last call of set_epoch alone",
            )

    def estimate(self) -> None:
        """What saving will cost."""
        cost = checkpoint_cost(
            self.saved, self.stage.config, self.trainer.num_steps(), Path(self.request.store)
        )
        tell(self.request.told, "cost", cost=cost.as_json())
        for severity, message in cost_findings(cost, self.step_s):
            self.telling.find(severity, message)

    def _restore(self, trainer: Trainer) -> None:
        try:
            trainer.state.restore(self.saved.tensors, self.saved.state)
        except CheckpointMismatchError as error:
            message = str(error).partition(": use the settings")[0]
            raise CheckpointMismatchError(
                f"a checkpoint of this model cannot be resumed: {message}{FIXED_SHAPES}"
            ) from error

    def _fresh_experiment(self) -> Any:
        experiment_class = load_experiment(self.arguments.experiment)
        return build_experiment(experiment_class, self.stage.config, self.stage.record.seeds)

    def _check_fetching(self, first: Step, before: Fingerprints) -> None:
        again = _step(self.trainer, 0)
        wrong = differing(tensors_in(first), tensors_in(again))
        if not wrong:
            return
        after = hidden_state(self.trainer.state.model, data_set=self.trainer.loader.dataset)
        moved = [path for path, found in after.items() if before.get(path, found) != found]
        self.telling.find(
            "warning",
            f"the first training batch was another one when it was fetched again: {shown(wrong)} "
            f"differ{f' ({shown(moved)} changed)' if moved else ''}; a data set must not keep "
            "state between two calls: draw from random, NumPy's global generator or torch, which "
            "are seeded by the place in the run",
        )

    def _hidden(self, trainer: Trainer, stage: Stage) -> Fingerprints:
        return hidden_state(
            trainer.state.model,
            experiment=stage.experiment,
            data_set=trainer.loader.dataset,
            optimizers=own_attributes(trainer.state.optimizers),
        )

    def _module_state(self) -> Fingerprints:
        source = sys.modules[type(self.stage.experiment).__module__]
        return module_state(source)

    def _changed_globals(self) -> list[str]:
        now = self._module_state()
        return [path for path, found in self._globals.items() if now.get(path) != found]


def _plain(config: RunConfig) -> RunConfig:
    """Without what costs time and changes nothing that is looked at: compiler, loader processes."""
    train = config.train.model_copy(update={"should_compile": False})
    data = config.data.model_copy(update={"num_workers": 0})
    return config.model_copy(update={"train": train, "data": data})


def _step(trainer: Trainer, number: int, epoch: int = 0) -> Step:
    """The microbatches of a step of an epoch; of the next one's start after its last."""
    return _first_step(trainer.loader, epoch, number)


def _is_told_epochs(dataset: object) -> bool:
    return callable(getattr(dataset, "set_epoch", None))


def _first_step(loader: Loader, epoch: int, number: int) -> Step:
    return next(whole_steps(loader.steps(epoch, number)))


def _metric_keys(config: RunConfig) -> Sequence[tuple[str, str]]:
    """Keys of the configuration that name a metric, with the metric."""
    keys = [*config.ranking_metrics.items()]
    if config.scheduler.name == "ReduceLROnPlateau":
        keys.append(("scheduler.metric", config.scheduler.metric))
    for side in ("keep_above", "keep_below"):
        keys += [(f"checkpoint.{side}", name) for name in getattr(config.checkpoint, side)]
    if config.promotion.metric is not None:
        keys.append(("promotion.metric", config.promotion.metric))
    if "onnx_int8" in config.export.formats and config.export.int8_metric is not None:
        keys.append(("export.int8_metric", config.export.int8_metric))
    return keys
