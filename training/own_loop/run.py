"""``holdfast.run``: a training script keeps its loop, and the run is exact."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from holdfast.training.data.loader import WorkerInit
from holdfast.training.errors import HoldfastError, InputError, UnsupportedStateError
from holdfast.training.exactness.seeding import derive_seed
from holdfast.training.exactness.strictness import warn_of_inexactness
from holdfast.training.experiment.error_places import is_users
from holdfast.training.export.specification import Dimensions, ExportSpec
from holdfast.training.loop.evaluation import model_device
from holdfast.training.own_loop import arguments
from holdfast.training.own_loop.champion import (
    Build,
    Evaluate,
    HandedOver,
    Metrics,
    require_usable,
)
from holdfast.training.own_loop.ending import Ending, leave_fork, tell_in_one_line
from holdfast.training.own_loop.environment import note_outcome
from holdfast.training.own_loop.finished import FinishedTraining
from holdfast.training.own_loop.following import FollowingSegment
from holdfast.training.own_loop.host import ChampionReachedError, current_host
from holdfast.training.own_loop.kept import NOT_A_STEP, Kept, WatchedUpdates, as_handed_over
from holdfast.training.own_loop.loader import (
    Collate,
    RunLoader,
    adopted_loader,
    build_loader,
    require_own,
)
from holdfast.training.own_loop.opening import Opened, open_run, require_main_thread
from holdfast.training.own_loop.replayed import ReplayedSegment
from holdfast.training.own_loop.segment import ScriptSegment
from holdfast.training.own_loop.state import Place, Whole
from holdfast.training.replicas.copies import Copies, own_module
from holdfast.training.replicas.starting import EndedInProcessesError
from holdfast.training.runs.directory import has_ended
from holdfast.training.stage import EXIT_PREEMPTED, NoticeCameError, tell_error

OTHER_PASSES = "for passes that do not train take torch's own DataLoader"


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
        self._is_in_epochs = self._is_in_step = self._is_finished = self._has_looped = False
        self._updates = WatchedUpdates(self._kept)
        self._pid, self._loop = os.getpid(), ""
        self._segment: ScriptSegment | FinishedTraining | None = None
        self._logged: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}

    @property
    def values(self) -> dict[str, Any]:
        """Plain numbers, text, tensors and nests of them, by name."""
        return self._kept.values

    @values.setter
    def values(self, value: object) -> None:
        raise InputError(
            f"run.values = …: it is there already, and is kept: write run.values[name] = …, or "
            f"run.values.update(…); found {arguments.found(value)}"
        )

    @property
    def step(self) -> int:
        """Steps that are done."""
        return 0 if self._segment is None else self._segment.step

    @property
    def directory(self) -> Path:
        """Where the run lies."""
        return self._opened.run.path

    @property
    def rank(self) -> int:
        """The number of this process, of those that ``distributed.num_processes`` asks for."""
        return self._opened.rank

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as each of several processes trains it; in one process, the model itself.

        Its gradients are the means over all processes. To be called with a model whose weights
        are the same in each, before the first step. ``run.keep`` takes either.

        Raises InputError, which says why, where it cannot be trained so.
        """
        self._require_here("run.parallel(…)")
        arguments.module("run.parallel(…)", model)
        if self._segment is not None:
            raise InputError("run.parallel(…) came after training had begun: call it before")
        return model if self._copies is None else self._copies.of(model)

    def keep(self, *unnamed: Any, **objects: Any) -> None:
        """Hand over what changes while training, each under a name of its own.

        Modules, optimizers, schedulers, a gradient scaler, generators (torch's, NumPy's, Python's),
        and whatever has ``state_dict`` and ``load_state_dict`` of JSON and tensors. Plain values
        belong into ``values``. To be called before the first step.

        Raises InputError, which names the object and the way out, where one cannot be kept.
        """
        self._require_here("run.keep(…)")
        if unnamed:
            raise InputError(
                f"run.keep(…): found {arguments.found(unnamed[0])} without a name; write "
                f"run.keep(model=model, optimizer=optimizer, …)"
            )
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
        **others: Any,
    ) -> RunLoader:
        """Shuffled batches of a data set with ``__len__`` and ``__getitem__``; see ``RunLoader``.

        The arguments are those of ``torch.utils.data.DataLoader``. A batch of tuples is a tuple.
        Raises InputError for others that it has, and for what none of them can be.
        """
        self._require_here("run.loader(…)")
        require_own(others)
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
            copies=self._copies,
        )
        return self._added(name, loader)

    def adopted_loader(self, loader: DataLoader[Any]) -> RunLoader:
        """The batches of a DataLoader that a trainer has made, as batches of this run.

        Its sampler draws each epoch from (seed, epoch), its items from (seed, epoch, position).
        """
        if self._copies is not None:
            raise InputError(
                f"{self._copies.world.size} processes train, and a trainer with a loop of its own "
                f"is taken over in one: leave distributed.num_processes out"
            )
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
        saved, unless epochs go on. Raises InputError for a number that is none, and for a second
        loop.
        """
        num_steps = arguments.whole_number("run.steps(…)", num_steps, 1)
        self._require_one_loop("run.steps(…)", may_repeat=self._is_in_epochs)
        return self._steps(num_steps)

    def _steps(self, num_steps: int) -> Iterator[int]:
        segment = self._begin()
        if isinstance(segment, ScriptSegment):
            if self._is_in_epochs:
                segment.begin_steps_of_epoch()
            while self._place.step < num_steps and not self._is_over:
                self.begin_step()
                try:
                    yield self._place.step
                except GeneratorExit:  # the loop was left
                    self._end_where_over()
                    raise
                if not self._is_in_epochs:
                    self.end_step(num_steps)
                else:  # the script has more to do, with what the last step left in its variables
                    self.end_step(should_save=self._place.step + 1 < num_steps)
        if not self._is_in_epochs:
            self.complete()

    def begin_step(self) -> None:
        """What ``steps`` does before each step, for a trainer that has a loop of its own.

        Before the first one, everything that was kept is put back. At a notice the state is saved
        and the process exits with 75.
        """
        self._require_here("a step of the run")
        with _named_as_handed_over():
            self._answer_notice(self._training())
        self._updates.begin_step(self.step)
        if self._copies is not None:
            self._copies.begin_step(self.step)
        self._is_in_step = True

    def end_step(self, num_steps: int | None = None, *, should_save: bool = True) -> None:
        """The state is whole again: saves where that is due and should. ``num_steps`` is shown."""
        self._require_here("a step of the run")
        segment = self._training()
        self._is_in_step = False
        self._place.step += 1
        logged, self._logged = self._logged, {}
        if self._copies is not None:
            logged = self._copies.end_step(self.step, logged, is_over=self._place.is_over)
        with _named_as_handed_over():
            segment.after_step(logged, num_steps)
            if not self._save_validated(segment) and should_save:
                segment.save_if_due()

    def restore(self) -> None:
        """Put back everything that was kept, where a step has not done so already."""
        self._begin()

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The numbers of the epochs that are left of ``num_epochs``, from 0.

        Each holds a loop over ``run.steps(n)`` or ``for batch in loader``. An epoch that was
        interrupted begins again with the steps that are left of it: what stands before them is
        done again, and what it changed of what is kept is then undone. Raises InputError for a
        number that is none, and for a second loop.
        """
        num_epochs = arguments.whole_number("run.epochs(…)", num_epochs, 1)
        self._require_one_loop("run.epochs(…)", may_repeat=False)
        return self._epochs(num_epochs)

    def _epochs(self, num_epochs: int) -> Iterator[int]:
        segment = self._begin()
        if isinstance(segment, ScriptSegment):
            while self._place.epoch < num_epochs and not self._is_over:
                self._is_in_epochs = True
                try:
                    yield self._place.epoch
                except GeneratorExit:
                    self._end_where_over(is_epoch=True)
                    raise
                self._end_epoch(segment, is_last=self._place.epoch + 1 == num_epochs)
        self.complete()

    def _end_epoch(self, segment: ScriptSegment, *, is_last: bool = True) -> None:
        if not (segment.step or self._place.is_over):
            raise InputError(f"the first epoch of run.epochs(…) had no step: {NOT_A_STEP}")
        if self._is_in_step:
            told = (
                f"the loop over the steps of an epoch was left within step {self.step + 1}, as by "
                f"break: write for step in run.steps(…) with the number of steps that an epoch is "
                f"to have, and in it next(loader)"
            )
            if not is_last:
                raise InputError(told)
            warn_of_inexactness(f"{told}; that step is not counted")
            self._is_in_step = False
        self._is_in_epochs = False
        self._place.epoch, self._place.step = self._place.epoch + 1, 0
        self._place.has_begun = False
        with _named_as_handed_over():
            if not self._save_validated(segment):
                segment.save_if_due()

    def _end_where_over(self, *, is_epoch: bool = False) -> None:
        """After ``finish``, a loop is not asked for more: end the step, and the epoch."""
        if not self._place.is_over or self._has_ended:
            return
        if self._is_in_step:
            self.end_step()
        if self._is_in_epochs and is_epoch:
            self._end_epoch(self._training())
        if not self._is_in_epochs:
            self.complete()

    def steps_of_epoch(self, num_steps: int) -> Iterator[int]:
        """What ``for batch in loader`` counts."""
        if not self._is_in_epochs:
            raise InputError(
                "for batch in loader: stands outside of run.epochs(…): loop over its epochs, or "
                f"over run.steps(…) with next(loader), which never ends; {OTHER_PASSES}"
            )
        return self.steps(num_steps)

    def require_step(self, what: str, way_out: str = OTHER_PASSES) -> None:
        """Raise InputError, which ends with the way out, outside of a step."""
        self._require_here(what)
        if not self._is_in_step:
            raise InputError(
                f"{what} stands outside of a step: such are those of run.steps(…), and in "
                f"run.epochs(…) the batches of run.loader(…); {way_out}"
            )

    def log(self, **values: float | Tensor) -> None:
        """Tell of this step, as scalars: ``loss`` in the progress, its bits in the run's folder.

        Does not wait for a device.
        """
        self.require_step("run.log(…)", "what an epoch has come to is for run.validated(…)")
        for name, value in values.items():
            self._logged[name] = arguments.scalar(f"run.log({name}=…)", value)

    def validated(self, **metrics: float | Tensor) -> dict[str, float]:
        """Validation metrics of the weights as they are now, where selection may choose.

        They are saved with the next state, and go into the history. To be called at places that
        depend on the step alone. Returns them; of several processes, the means of what each has
        measured.
        """
        self._require_here("run.validated(…)")
        if not (self._is_in_step or self._is_in_epochs):
            raise InputError(
                "run.validated(…) stands outside of run.steps(…) and run.epochs(…): call it within "
                "the loop, where the step alone decides"
            )
        if not metrics:
            raise InputError("run.validated(): expected metrics by name, such as loss=…")
        taken: dict[str, float] = {}
        for name, value in metrics.items():
            found = arguments.scalar(f"run.validated({name}=…)", value)
            number = found.item() if isinstance(found, Tensor) else found
            taken[name] = float(arguments.scalar(f"run.validated({name}=…)", number))
        if self._copies is not None:
            taken = self._copies.metrics(taken)
        self._metrics |= taken
        return taken

    @contextmanager
    def averaged(self, decay: float) -> Iterator[None]:
        """The models hold the moving average of this decay within the block, as to validate it.

        Raises InputError for a decay that ``ema.decays`` does not name.
        """
        decays = self._opened.config.ema.decays
        if decay not in decays:
            named = ", ".join(map(repr, decays)) or "none"
            raise InputError(
                f"run.averaged({decay!r}): expected one of settings={{'ema.decays': […]}} of "
                f"holdfast.run, found {arguments.found(decay)}; it names {named}"
            )
        state = self._begin().state
        with state.averages.applied(state.model, f"decay-{decay!r}"):
            yield

    def finish(self) -> None:
        """Training ends before the loop's own end, and does so when it is started again, too.

        The step and the epoch in which this is called are the last; then the run is saved.
        """
        self._require_here("run.finish()")
        if not self._has_ended:
            self._training()
            self._place.is_over = True
        if not (self._is_in_step or self._is_in_epochs):
            self.complete()

    def complete(self) -> None:
        """All steps are done: saves, and lets the run go."""
        self._has_looped = True
        self._updates.end()
        if isinstance(self._segment, ScriptSegment) and not self._is_finished:
            self._is_finished = True
            with _named_as_handed_over(), self._failure_recorded(self._segment):
                if self._copies is not None:
                    self._copies.require_same(self._segment.state)
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
        self._require_here("run.champion(…)")
        if self._segment is None or self._is_in_step or self._is_in_epochs or not self._has_ended:
            raise InputError(
                f"run.champion(…) came after {self.step} steps, and training had not ended: call "
                f"it after the loop over run.steps or run.epochs"
            )
        whole, kept = Whole(self._kept, self._loaders, self._place), self._kept.model()
        found = HandedOver(
            build=own_module(model),
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
    def _copies(self) -> Copies | None:
        return self._opened.copies

    @property
    def _has_ended(self) -> bool:
        return self._is_finished or isinstance(self._segment, FinishedTraining)

    @property
    def _is_over(self) -> bool:
        """Whether no step is to be begun any more."""
        return self._is_finished or self._place.is_over

    def _begin(self) -> ScriptSegment | FinishedTraining:
        if self._segment is None:
            require_main_thread("training began")
            try:
                self._segment = self._kind()(self._opened, self._kept, self._loaders, self._place)
            except NoticeCameError:
                self._is_finished = True
                sys.exit(EXIT_PREEMPTED)
        return self._segment

    def _kind(self) -> type[ScriptSegment] | type[FinishedTraining]:
        if self._opened.trial.replay_steps is not None:
            return ReplayedSegment
        host = current_host()
        is_over = host is not None and (not host.is_training or has_ended(self._opened.run))
        if is_over:
            return FinishedTraining
        return ScriptSegment if self.rank == 0 else FollowingSegment

    def _training(self) -> ScriptSegment:
        segment = self._begin()
        if isinstance(segment, FinishedTraining):
            raise InputError(f"{self.directory}: training has ended, and there is no step left")
        return segment

    def _answer_notice(self, segment: ScriptSegment) -> None:
        if self._copies is not None and not segment.has_begun:
            self._copies.vote()
        notice = segment.before_step()
        if notice is not None:
            self._is_finished = True
            with self._failure_recorded(segment):
                segment.stop(notice)
            sys.exit(EXIT_PREEMPTED)
        if segment.is_over():
            self.complete()
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
            if self._copies is not None:
                self._copies.require_same(segment.state)
            segment.validated(metrics)
        return bool(metrics)

    def end(self, error: BaseException | None) -> HoldfastError | None:
        """What is left to do at the end of the process; what is wrong with it, beside ``error``.

        A script that itself ended well has to have come to the end of its loop, and its bucket to
        have what is saved.
        """
        wrong, companion = self._end(error), self._opened.companion
        behind = None if companion is None else companion.finish()
        if self._copies is not None and (told := error or wrong) is not None:
            self._copies.tell_end(told)
        self._opened.closing.close()
        return wrong or behind

    def cause(self, error: BaseException) -> BaseException:
        """What ended the script: another process has, where torch says so in words of its own."""
        return error if self._copies is None else self._copies.cause(error)

    def _end(self, error: BaseException | None) -> InputError | None:
        if error is None:
            self._end_where_over(is_epoch=True)
        if self._has_ended:
            return None
        self._is_finished = True
        wrong = None if error is not None else self._unfinished()
        told = error or wrong
        if isinstance(self._segment, ScriptSegment) and told is not None:
            self._segment.fail(told)
        return wrong

    def _unfinished(self) -> InputError:
        if self._segment is None:
            return InputError(
                "the script called holdfast.run and took no step from it, so that nothing is kept: "
                "loop over run.steps(…) or run.epochs(…), after run.keep(model=model, …)"
            )
        return InputError(
            f"the script ended after step {self.step}, and its loop had not{self._loop}: call "
            f"run.finish() where training is to end before"
        )

    def _require_one_loop(self, what: str, *, may_repeat: bool) -> None:
        """Raise InputError for a loop within a step, and for a second one."""
        self._require_here(what)
        if self._is_in_step or (self._is_in_epochs and not may_repeat):
            inside = "a step" if self._is_in_step else "run.epochs(…)"
            raise InputError(
                f"{what} stands within {inside} of the loop: write for epoch in run.epochs(…), and "
                f"in it for step in run.steps(…), or one of them alone"
            )
        if self._has_looped:
            raise InputError(
                f"{what} came after a loop that had ended: a run has one loop, give it all steps"
            )
        self._loop = _users_line()

    def _require_here(self, what: str) -> None:
        """Leave a process that the script has forked: the run is its parent's."""
        if os.getpid() != self._pid:
            leave_fork(what)


@contextmanager
def _named_as_handed_over() -> Iterator[None]:
    """What cannot be saved is named as the script wrote it."""
    try:
        yield
    except UnsupportedStateError as error:
        raise InputError(as_handed_over(str(error))) from error


def _users_line() -> str:
    """The line of the script's that is running, in brackets."""
    frame = sys._getframe(1)
    while frame is not None and not is_users(Path(frame.f_code.co_filename)):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f" ({frame.f_code.co_filename}:{frame.f_lineno})"


_current: Run | None = None


def current_run(who: str) -> Run:
    """The run of this process. Raises InputError, in the name of ``who``, where there is none."""
    if _current is None:
        if current_host() is None:
            tell_in_one_line()
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
    try:
        _current = Run(open_run(experiment, run_id, store, seed, config, settings))
    except EndedInProcessesError as ended:
        if host is not None:
            raise
        tell_error(ended.outcome)
        sys.exit(ended.outcome.exit_code)
    note_outcome(run=str(_current.directory))
    if ending is not None:
        ending.watch(_current.end, _current.cause)
    elif host is not None:
        host.run = _current
    return _current
