"""Lightning's Trainer, whose loop stays as it is, as the steps of a run.

Names of Lightning that are not public, and what for: the loops' progress is read and put back by
``fit_loop.state_dict``; ``fit_loop._data_fetcher`` counts batches, too; ``_logger_connector`` and
``epoch_loop._results`` hold what was logged in the epoch so far, which callbacks and schedulers
look at; ``_signal_connector`` remembers a SIGTERM, and would end training by it;
``_val_check_time_interval`` tells of validations by the clock.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from holdfast.training.errors import InputError, kind_of
from holdfast.training.integrations.callbacks import require_told_state
from holdfast.training.integrations.lightning_state import TrainerPart, restore_place, told_metrics
from holdfast.training.integrations.stepping import TRAINER, SteppedRun
from holdfast.training.own_loop.ending import tell_in_one_line
from holdfast.training.own_loop.loader import RunLoader
from holdfast.training.own_loop.run import current_run
from holdfast.training.preemption.signals import NOTICE_SIGNALS

try:
    from lightning.pytorch.callbacks import Callback, Timer
    from lightning.pytorch.strategies import SingleDeviceStrategy
except ImportError as error:
    tell_in_one_line()
    raise InputError(
        f"holdfast.integrations.lightning: {error}; write: pip install 'holdfast[lightning]'"
    ) from error


class Exact(Callback):  # type: ignore[misc]
    """Makes a Trainer exact: ``Trainer(callbacks=[…, Exact()])``.

    ``trainer.fit`` trains the run that ``holdfast.run`` began, from where it stands: it saves,
    restores and answers notices; Lightning's own checkpoints are none of its matter. Raises
    InputError for arguments with which no run is exact.
    """

    def __init__(self) -> None:
        self._stepped: SteppedRun | None = None
        self._state: TrainerPart | None = None
        self._loader: RunLoader | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before training: the run is found, and the training data set's loader is taken over."""
        if stage != "fit":
            return
        run = current_run("Trainer.fit()")
        for problem in _problems(trainer, pl_module, self._stepped):
            raise InputError(f"Trainer.fit: {problem}")
        self._state = TrainerPart(trainer, self)
        self._stepped = SteppedRun(run, lambda: self._kept(trainer), lambda: trainer.global_step)
        self._handlers = {number: signal.getsignal(number) for number in NOTICE_SIGNALS}
        self._take_part(trainer, trainer.strategy)

    def _take_part(self, trainer: Any, strategy: Any) -> None:
        """Be called by the strategy, where callbacks are not."""
        process, load, end = (
            strategy.process_dataloader,
            strategy.load_checkpoint,
            strategy.on_train_end,
        )

        def process_dataloader(loader: Any) -> Any:
            processed = process(loader)
            return self._adopted(trainer, processed) if trainer.training else processed

        def load_checkpoint(*arguments: Any, **named: Any) -> Any:
            if trainer.training:
                raise InputError("Trainer.fit: ckpt_path: the run goes on by itself; leave it out")
            return load(*arguments, **named)

        def on_train_end() -> None:  # after all callbacks'
            end()
            self._finish()

        strategy.process_dataloader = process_dataloader
        strategy.load_checkpoint = load_checkpoint
        strategy.on_train_end = on_train_end

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is built: the loops begin where the run stands."""
        del pl_module
        if self._stepped is not None and self._stepped.newest is not None:
            restore_place(trainer, self._stepped.newest.state)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning has just taken the signals over."""
        self._take_signals_back(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """As before a sanity check, where there is none."""
        self._take_signals_back(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The bits of the loss are kept."""
        del trainer, batch, batch_idx
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and self._stepped is not None:
            # Lightning has divided it already by the number of batches, where it steps itself.
            self._stepped.log(loss, is_mean=not pl_module.automatic_optimization)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """What was logged is the run's metrics."""
        del pl_module
        if self._stepped is not None and not trainer.sanity_checking:
            self._stepped.validated(told_metrics(trainer))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Where there was nothing left to train: the module gets its weights."""
        del trainer, pl_module
        self._finish()

    def _finish(self) -> None:
        if self._stepped is not None and self._state is not None and not self._state.is_over:
            self._state.is_over = True
            self._stepped.finish()

    def _take_signals_back(self, trainer: Any, pl_module: Any) -> None:
        """Lightning ends training at SIGTERM at once; notices are the run's to answer."""
        del pl_module
        trainer._signal_connector.received_sigterm = False  # of one that came before
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _adopted(self, trainer: Any, loader: Any) -> _Batches:
        if self._loader is not None:
            raise InputError(
                "Trainer.fit: there is a second DataLoader for training: one run takes batches "
                "from one; let a data set give what belongs together"
            )
        if not isinstance(loader, DataLoader):
            raise InputError(
                f"Trainer.fit: train_dataloader is {kind_of(loader)}, which cannot be gone "
                f"back into: return a torch.utils.data.DataLoader"
            )
        self._loader = current_run("Trainer.fit()").adopted_loader(loader)
        assert self._stepped is not None
        return _Batches(trainer, self._stepped, self._loader)

    def _kept(self, trainer: Any) -> dict[str, Any]:
        module = trainer.lightning_module
        for callback in trainer.callbacks:
            if not _tells_state(callback):
                require_told_state(callback, module, "state_dict and load_state_dict")
        kept = {"model": module, TRAINER: self._state}
        kept |= _numbered("optimizer", trainer.optimizers)
        kept |= _numbered("scheduler", [c.scheduler for c in trainer.lr_scheduler_configs])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return kept if scaler is None else {**kept, "scaler": scaler}


class _Batches:
    """What Lightning iterates over, in the place of the DataLoader: batches of the run."""

    def __init__(self, trainer: Any, stepped: SteppedRun, loader: RunLoader) -> None:
        self._trainer, self._stepped, self._loader = trainer, stepped, loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        while progress.current.ready < len(self._loader):
            self._stepped.before_batch()  # the first one puts the progress back
            self._loader.move_to(self._trainer.current_epoch, progress.current.ready)
            yield next(self._loader)


def _tells_state(callback: Any) -> bool:
    return isinstance(callback, Exact) or any(
        getattr(type(callback), name) is not getattr(Callback, name)
        for name in ("state_dict", "on_save_checkpoint")
    )


def _numbered(name: str, objects: Iterable[Any]) -> dict[str, Any]:
    return {f"{name}_{number}" if number else name: each for number, each in enumerate(objects)}


def _problems(trainer: Any, module: Any, stepped: SteppedRun | None) -> Iterable[str]:
    """What no run is exact with, each with the way out."""
    if stepped is not None:
        yield "it was called twice in one process: train one run in each process"
    if not isinstance(trainer.strategy, SingleDeviceStrategy) or trainer.world_size > 1:
        yield (
            f"{type(trainer.strategy).__name__}: several devices and processes are not taken "
            f"over; write Trainer(devices=1)"
        )
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):
        yield "max_time and Timer end training by the clock: write max_epochs or max_steps"
    if trainer._val_check_time_interval is not None:
        yield "val_check_interval validates by the clock: give a number of batches"
    if trainer.reload_dataloaders_every_n_epochs:
        yield "reload_dataloaders_every_n_epochs: let the data set itself have set_epoch"
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "training_step(dataloader_iter) takes batches by itself: take batch and batch_idx"
