"""``holdfast.run``: a training script keeps its loop, and the run is exact."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from holdfast.training.data.loader import WorkerInit
from holdfast.training.errors import InputError
from holdfast.training.exactness.seeding import derive_seed
from holdfast.training.export.specification import Dimensions, ExportSpec
from holdfast.training.loop.evaluation import model_device
from holdfast.training.own_loop.champion import (
    Build,
    Evaluate,
    HandedOver,
    Metrics,
    require_usable,
)
from holdfast.training.own_loop.ending import Ending
from holdfast.training.own_loop.finished import FinishedTraining, has_ended
from holdfast.training.own_loop.host import ChampionReachedError, current_host
from holdfast.training.own_loop.kept import Kept
from holdfast.training.own_loop.loader import Collate, RunLoader, adopted_loader, build_loader
from holdfast.training.own_loop.newest import Newest, newest_state
from holdfast.training.own_loop.opening import Opened, open_run, require_main_thread
from holdfast.training.own_loop.replayed import ReplayedSegment
from holdfast.training.own_loop.segment import ScriptSegment
from holdfast.training.own_loop.state import Place, Whole
from holdfast.training.stage import EXIT_PREEMPTED


class Run:
    """One training whose loop is a script's own. Made by ``holdfast.run``.

    Between two steps the state is whole: what was kept, the generators, the places of the loaders
    and ``values`` are then saved as the configuration says, and at a notice, upon which the
    process exits with 75. Started again, the script comes to the same loop, which goes on where
    the newest good checkpoint stands.

    Attributes:
        values: plain numbers, text, tensors and nests of them that change from step to step. What
            a checkpoint has replaces what the script put there before the first step.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._kept = Kept()
        self._loaders: dict[str, RunLoader] = {}
        self._place = Place()
        self._is_in_epochs = self._is_in_step = self._is_finished = False
        self._segment: ScriptSegment | FinishedTraining | None = None
        self._logged: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        self.values = self._kept.values

    @property
    def step(self) -> int:
        """Steps that are done."""
        return 0 if self._segment is None else self._segment.step

    @property
    def directory(self) -> Path:
        """Where the run lies."""
        return self._opened.run.path

    def keep(self, **objects: Any) -> None:
        """Hand over what changes while training, each under a name of its own.

        Modules, optimizers, schedulers, a gradient scaler, generators (torch's, NumPy's, Python's),
        and whatever has ``state_dict`` and ``load_state_dict`` of JSON and tensors. Plain values
        belong into ``values``. To be called before the first step.

        Raises InputError, which names the object and the way out, where one cannot be kept.
        """
        if self._segment is not None:
            raise InputError(
                f"run.keep({', '.join(objects)}) came after training had begun: hand over "
                f"everything before run.steps or run.epochs"
            )
        for name, kept in objects.items():
            self._kept.add(name, kept)

    def loader(  # noqa: PLR0913  # the names of torch's DataLoader
        self,
        dataset: Any,
        batch_size: int = 1,
        *,
        drop_last: bool = False,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        collate_fn: Collate | None = None,
        worker_init_fn: WorkerInit | None = None,
        pin_memory: bool = False,
    ) -> RunLoader:
        """Shuffled batches of a data set with ``__len__`` and ``__getitem__``; see ``RunLoader``.

        The arguments are those of ``torch.utils.data.DataLoader``. A batch of tuples is a tuple.
        """
        name, trial = f"loader-{len(self._loaders) + 1}", self._opened.trial
        loader = build_loader(
            self,
            dataset,
            batch_size=batch_size,
            drop_last=drop_last,
            num_workers=num_workers if trial.num_workers is None else trial.num_workers,
            prefetch_factor=prefetch_factor,
            collate_fn=collate_fn,
            worker_init_fn=worker_init_fn,
            pin_memory=pin_memory,
            seed=derive_seed(self._opened.seed, name),
        )
        return self._added(name, loader)

    def adopted_loader(self, loader: DataLoader[Any]) -> RunLoader:
        """The batches of a DataLoader that a trainer has made, as batches of this run.

        Its sampler draws each epoch from (seed, epoch), its items from (seed, epoch, position).
        """
        name = f"loader-{len(self._loaders) + 1}"
        seed = derive_seed(self._opened.seed, name)
        adopted = adopted_loader(self, loader, seed, self._opened.trial.num_workers)
        return self._added(name, adopted)

    def _added(self, name: str, loader: RunLoader) -> RunLoader:
        if self._segment is not None:
            raise InputError("run.loader(…) came after training had begun: make it before")
        self._loaders[name] = loader
        return loader

    def steps(self, num_steps: int) -> Iterator[int]:
        """The numbers of the steps that are left of ``num_steps``, from 0.

        Within ``run.epochs`` they are the steps of this epoch. After the last one everything is
        saved, unless epochs go on.
        """
        segment = self._begin()
        if isinstance(segment, FinishedTraining):
            return
        while self._place.step < num_steps and not self._is_finished:
            self.begin_step()
            yield self._place.step
            self.end_step(None if self._is_in_epochs else num_steps)
        if not self._is_in_epochs:
            self.finish()

    def begin_step(self) -> None:
        """What ``steps`` does before each step, for a trainer that has a loop of its own.

        Before the first one, everything that was kept is put back. At a notice the state is saved
        and the process exits with 75.
        """
        self._answer_notice(self._training())
        self._is_in_step = True

    def end_step(self, num_steps: int | None = None) -> None:
        """The state is whole again: saves where that is due. ``num_steps`` is shown."""
        segment = self._training()
        self._is_in_step = False
        self._place.step += 1
        logged, self._logged = self._logged, {}
        segment.after_step(logged, num_steps)
        if not self._save_validated(segment):
            segment.save_if_due()

    def restore(self) -> None:
        """Put back everything that was kept, where a step has not done so already."""
        self._begin()

    def newest(self, name: str) -> Newest | None:
        """What the newest checkpoint has of an object that was kept, before it is restored.

        None where there is no checkpoint. Takes no lease: whoever restores makes sure that it was
        this one.
        """
        return newest_state(self._opened.run, name)

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The numbers of the epochs that are left of ``num_epochs``, from 0.

        Each holds a loop over ``run.steps(n)`` or ``for batch in loader``. An epoch that was
        interrupted begins again with the steps that are left of it.
        """
        segment = self._begin()
        if isinstance(segment, FinishedTraining):
            return
        while self._place.epoch < num_epochs and not self._is_finished:
            self._is_in_epochs = True
            yield self._place.epoch
            self._is_in_epochs = False
            self._place.epoch, self._place.step = self._place.epoch + 1, 0
            self._save_validated(segment)
        self.finish()

    def steps_of_epoch(self, num_steps: int) -> Iterator[int]:
        """What ``for batch in loader`` counts."""
        if not self._is_in_epochs:
            raise InputError(
                "for batch in loader: stands outside of run.epochs(…): loop over its epochs, or "
                "over run.steps(…) with next(loader)"
            )
        return self.steps(num_steps)

    def require_step(self, what: str) -> None:
        """Raise InputError outside of a step."""
        if not self._is_in_step:
            raise InputError(
                f"{what} stands outside of a step: take batches within for step in run.steps(…)"
            )

    def log(self, **values: float | Tensor) -> None:
        """Tell of this step, as scalars: ``loss`` in the progress, its bits in the run's folder.

        Does not wait for a device.
        """
        self.require_step("run.log(…)")
        for name, value in values.items():
            _require_scalar(f"run.log({name}=…)", value)
        if isinstance(values.get("loss"), str):
            raise InputError("run.log(loss=…): expected a number, found a str")
        self._logged.update(values)

    def validated(self, **metrics: float | Tensor) -> None:
        """Validation metrics of the weights as they are now, where selection may choose.

        They are saved with the next state, and go into the history. To be called at places that
        depend on the step alone.
        """
        if not (self._is_in_step or self._is_in_epochs):
            raise InputError("run.validated(…) stands outside of run.steps(…) and run.epochs(…)")
        for name, value in metrics.items():
            _require_scalar(f"run.validated({name}=…)", value)
            number: object = value.item() if isinstance(value, Tensor) else value
            if not isinstance(number, Real):  # NumPy's, too
                raise InputError(
                    f"run.validated({name}=…): expected a number, found a {type(value).__name__}"
                )
            self._metrics[name] = float(number)

    @contextmanager
    def averaged(self, decay: float) -> Iterator[None]:
        """The models hold the moving average of this decay within the block, as to validate it."""
        state = self._begin().state
        with state.averages.applied(state.model, f"decay-{decay!r}"):
            yield

    def finish(self) -> None:
        """Training ends here, also before the loop's own end. Saves, and lets the run go."""
        if isinstance(self._segment, ScriptSegment) and not self._is_finished:
            self._is_finished = True
            with self._failure_recorded(self._segment):
                self._segment.finish()

    def champion(  # what an experiment has six methods for
        self,
        *,
        model: Build | None = None,
        evaluate: Evaluate | None = None,
        example_inputs: Any = None,
        metrics: Metrics | None = None,
        spec: ExportSpec | None = None,
        dynamic_dimensions: Dimensions | None = None,
    ) -> None:
        """Hand over what is needed for candidates, choice, test, export and bundle.

        To be called after the loop, once. ``holdfast run`` and ``holdfast resume`` make of it
        what they make of an experiment; else it is looked at, and nothing more.

        Args:
            model: the model that is kept, or a function that makes one like it.
            evaluate: of (model), or of (model, split) with the split ``validation`` or ``test``.
                Returns numbers by name, or tensors with one number for each sample by name, whose
                means are the metrics: then intervals are found, too. A lone number is
                ``selection.metric``. Who has no test data writes one of (model).
            example_inputs: what the model is called with, for some samples: a tensor, a tuple or a
                dict of tensors.
            metrics: metrics of such tensors, where they are no means.
            spec, dynamic_dimensions: as an experiment's ``export_spec`` and ``dynamic_dimensions``.

        Raises InputError, which says what was expected, also where training has not ended.
        """
        if self._segment is None or self._is_in_step or self._is_in_epochs or not self._has_ended:
            raise InputError(
                f"run.champion(…) came after {self.step} steps, and training had not ended: call "
                f"it after the loop over run.steps or run.epochs"
            )
        whole, kept = Whole(self._kept, self._loaders, self._place), self._kept.model()
        found = HandedOver(
            build=model,
            evaluate=evaluate,
            inputs=example_inputs,
            metric=self._opened.config.selection.metric,
            whole=whole,
            own_metrics=metrics,
            spec=spec or ExportSpec(),
            dynamic_dimensions=dynamic_dimensions or {},
            fingerprint=self._opened.record.experiment_digest,
            device_type="cuda" if model_device(kept).type == "cuda" else "cpu",
        )
        require_usable(found, kept)
        host = current_host()
        if host is None:
            path = self._opened.run.path
            self._opened.progress.emit("champion", next=f"holdfast resume {path}")
            return
        host.champion = found
        if not host.is_training:
            raise ChampionReachedError

    @property
    def opened(self) -> Opened:
        """What the run was opened with."""
        return self._opened

    @property
    def _has_ended(self) -> bool:
        return self._is_finished or isinstance(self._segment, FinishedTraining)

    def _begin(self) -> ScriptSegment | FinishedTraining:
        if self._segment is None:
            require_main_thread("training began")
            self._segment = self._kind()(self._opened, self._kept, self._loaders, self._place)
        return self._segment

    def _kind(self) -> type[ScriptSegment] | type[FinishedTraining]:
        if self._opened.trial.replay_steps is not None:
            return ReplayedSegment
        host = current_host()
        is_over = host is not None and (not host.is_training or has_ended(self._opened.run))
        return FinishedTraining if is_over else ScriptSegment

    def _training(self) -> ScriptSegment:
        segment = self._begin()
        if isinstance(segment, FinishedTraining):
            raise InputError(f"{self.directory}: training has ended, and there is no step left")
        return segment

    def _answer_notice(self, segment: ScriptSegment) -> None:
        notice = segment.before_step()
        if notice is not None:
            self._is_finished = True
            with self._failure_recorded(segment):
                segment.stop(notice)
            sys.exit(EXIT_PREEMPTED)
        if segment.is_over():
            self.finish()
            sys.exit(0)

    @contextmanager
    def _failure_recorded(self, segment: ScriptSegment) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            segment.fail(error)
            raise

    def _save_validated(self, segment: ScriptSegment) -> bool:
        metrics, self._metrics = self._metrics, {}
        if metrics:
            segment.validated(metrics)
        return bool(metrics)

    def end(self, error: BaseException | None) -> int:
        """What is left to do at the end of the process. Returns the exit code that it deserves."""
        if self._is_finished or not isinstance(self._segment, ScriptSegment):
            return 0
        self._is_finished = True
        if error is None:
            error = InputError(
                f"the script ended after step {self.step}, and its loop had not: call run.finish() "
                f"where training is to end before"
            )
            print(f"error: {error}", file=sys.stderr)
        self._segment.fail(error)
        return 1


def _require_scalar(what: str, value: object) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InputError(
            f"{what}: expected a number, found a tensor of shape {tuple(value.shape)}: take its "
            f"mean()"
        )


_current: Run | None = None


def current_run(who: str) -> Run:
    """The run of this process. Raises InputError, in the name of ``who``, where there is none."""
    if _current is None:
        raise InputError(
            f"{who} found no run: call holdfast.run(experiment, run_id, seed=…) before models and "
            f"data are made"
        )
    return _current


def run(
    experiment: str,
    run_id: str,
    *,
    store: str | os.PathLike[str] = "runs",
    seed: int = 0,
    config: object = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Begin, or go on with, a run whose loop is the script's own.

    Seeds ``random``, NumPy and torch; to be called before models and data are made.

    Args:
        experiment: name of what is trained; runs of one experiment lie in one folder.
        run_id: name of the run. Called again with the same, the script goes on with it.
        store: folder that holds all runs. ``holdfast exec`` may name another, and another run id.
        seed: root of every random number.
        config: everything else that changes the result: a dict, a dataclass or argparse's
            Namespace, of JSON. Another one under the same run id is refused.
        settings: Holdfast's own settings by dotted keys, such as ``checkpoint.every_steps``,
            ``ema.decays`` or ``selection.metric``; see docs/configuration.md.

    Raises InputError, which says what was expected, also for a second run in one process.
    """
    global _current  # a process has one lease, and its signals one reader
    if _current is not None:
        raise InputError(
            "holdfast.run was called twice in one process: train one run in each process"
        )
    host = current_host()
    ending = Ending() if host is None else None
    _current = Run(open_run(experiment, run_id, store, seed, config, settings))
    if ending is not None:
        ending.watch(_current.end)
    elif host is not None:
        host.run = _current
    return _current
