"""Transformers' Trainer, whose loop stays as it is, as the steps of a run.

Names of Trainer that are not public, and what for: ``_load_from_checkpoint`` is left out, since the
run restores; ``_tr_loss``, ``_total_loss_scalar``, ``_globalstep_last_logged`` and
``_initial_global_step`` are kept, so that what is logged after a resume is what would have been.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from holdfast.training.errors import InputError
from holdfast.training.integrations.callbacks import require_told_state
from holdfast.training.integrations.stepping import TRAINER, SteppedRun
from holdfast.training.own_loop.ending import tell_in_one_line
from holdfast.training.own_loop.loader import RunLoader
from holdfast.training.own_loop.run import current_run

try:
    import accelerate  # noqa: F401  # Trainer says late and in many words that it needs it
    import transformers
    from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState
except ImportError as error:
    tell_in_one_line()
    raise InputError(
        f"holdfast.integrations.transformers: {error}; write: pip install 'holdfast[transformers]'"
    ) from error

PRIVATE = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")
STATE_FILE = "trainer_state.json"
OF_THE_CLOCK = ("_runtime", "_per_second", "_time")
"""How metrics end that tell of the machine, and not of the weights."""
EVALUATION = "eval_"


class Exact:
    """Makes a Trainer exact: ``class MyTrainer(Exact, transformers.Trainer)``.

    ``train`` trains the run that ``holdfast.run`` began, from where it stands: it saves, restores
    and answers notices; Trainer's own checkpoints are none of its matter. Raises InputError for
    arguments with which no run is exact.
    """

    _stepped: SteppedRun | None = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As Trainer's. Started again, the script comes here, and training goes on."""
        trainer: Any = self
        run = current_run("Trainer.train()")
        for problem in _problems(trainer, resume_from_checkpoint, trial):
            raise InputError(f"Trainer.train: {problem}")
        state = _TrainerPart(trainer)
        stepped = SteppedRun(
            run, lambda: _kept(trainer, state), lambda: int(trainer.state.global_step)
        )
        self._stepped = stepped
        trainer.add_callback(_Evaluations(stepped))
        with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
            resumed = None
            if stepped.newest is not None:
                TrainerState(**stepped.newest.state["state"]).save_to_json(
                    str(Path(folder, STATE_FILE))
                )
                resumed = folder
            try:
                output = super().train(resumed, trial, ignore_keys_for_eval)  # type: ignore[misc]
            except _IsOverError:
                stepped.restore()
                trainer.is_in_train = False
                loss = trainer._total_loss_scalar / max(trainer.state.global_step, 1)
                output = transformers.trainer_utils.TrainOutput(trainer.state.global_step, loss, {})
        state.is_over = True
        stepped.finish()
        return output

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's own while nothing is trained; in ``train``, its batches in the run's order."""
        theirs = super().get_train_dataloader()  # type: ignore[misc]
        trainer: Any = self
        if self._stepped is None or not trainer.is_in_train:
            return theirs  # type: ignore[no-any-return]
        loader = current_run("Trainer").adopted_loader(theirs)
        batches = _Batches(trainer, self._stepped, loader)
        return DataLoader(batches, batch_size=None, collate_fn=_unchanged)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Samples, of whatever the loader's data set has."""
        trainer: Any = self
        if isinstance(dataloader.dataset, _Batches):
            return len(trainer.train_dataset)
        return super().num_examples(dataloader)  # type: ignore[misc, no-any-return]

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """As Trainer's; the bits of the loss are kept."""
        loss: Tensor = super().training_step(*arguments, **named)  # type: ignore[misc]
        assert self._stepped is not None
        self._stepped.log(loss, is_mean=False)  # it is divided by the number of batches already
        return loss

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """Nothing: the folder has Trainer's place alone, and the run restores the rest."""


class Trainer(Exact, transformers.Trainer):  # type: ignore[misc]
    """Transformers' Trainer, which trains the run that ``holdfast.run`` began, exactly."""


class _IsOverError(Exception):
    """Training had ended before its last step, and was started again."""


class _Batches(IterableDataset[Any]):
    """What Trainer iterates over, once for each epoch: batches of the run, or skipped ones."""

    def __init__(self, trainer: Any, stepped: SteppedRun, loader: RunLoader) -> None:
        self._trainer, self._stepped, self._loader = trainer, stepped, loader
        steps_in_epoch = -(-len(loader) // trainer.args.gradient_accumulation_steps)
        done = 0 if stepped.newest is None else stepped.newest.state["state"]["global_step"]
        self._num_steps = steps_in_epoch
        self._epoch, step = divmod(done, steps_in_epoch)
        self._num_skipped = step * trainer.args.gradient_accumulation_steps

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        first, epoch = self._num_skipped, self._epoch
        self._num_skipped, self._epoch = 0, epoch + 1
        yield from repeat(None, first)  # Trainer counts them, and drops them
        if self._stepped.newest is not None and self._stepped.newest.state["is_over"]:
            raise _IsOverError
        for number in range(first, len(self._loader)):
            self._stepped.before_batch()
            self._require_whole_epochs(epoch, number)
            self._loader.move_to(epoch, number)
            yield next(self._loader)

    def _require_whole_epochs(self, epoch: int, number: int) -> None:
        step = number // self._trainer.args.gradient_accumulation_steps
        if self._trainer.state.global_step != epoch * self._num_steps + step:
            raise InputError(
                f"Trainer.train: a callback ended an epoch early (control.should_epoch_stop), "
                f"after which Trainer does not find its place again: pass over epoch {epoch} with "
                f"a smaller data set instead"
            )


class _Evaluations(TrainerCallback):  # type: ignore[misc]
    """Hands metrics to the run."""

    def __init__(self, stepped: SteppedRun) -> None:
        self._stepped = stepped

    def on_evaluate(self, *_: Any, metrics: Mapping[str, Any], **__: Any) -> None:
        """``eval_loss`` is the run's ``loss``."""
        self._stepped.validated(
            {
                name.removeprefix(EVALUATION): value
                for name, value in _of_weights(metrics).items()
                if isinstance(value, (int, float)) and name != "epoch"
            }
        )


class _TrainerPart:
    """Where Trainer stands, and what its callbacks keep."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.is_over = False

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        state = {
            **dataclasses.asdict(trainer.state),
            "log_history": [_of_weights(entry) for entry in trainer.state.log_history],
            "stateful_callbacks": {},  # in callbacks, by their own means
            "best_model_checkpoint": None,  # a path of this machine
        }
        return {
            "state": state,
            "is_over": self.is_over,
            "logged": {name: getattr(trainer, name) for name in PRIVATE},
            "flos": trainer.current_flos,
            "callbacks": [_told(callback) for callback in self._callbacks()],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        trainer = self._trainer
        for name, value in saved["state"].items():
            setattr(trainer.state, name, value)
        for name, value in saved["logged"].items():
            here = getattr(trainer, name)
            setattr(trainer, name, value.to(here.device) if isinstance(value, Tensor) else value)
        trainer.current_flos = saved["flos"]
        for callback, told in zip(self._callbacks(), saved["callbacks"], strict=True):
            _restore(callback, told)

    def _callbacks(self) -> list[Any]:
        return [c for c in self._trainer.callback_handler.callbacks if _has_state(c)]


def _kept(trainer: Any, state: _TrainerPart) -> dict[str, Any]:
    if missing := [name for name in PRIVATE if not hasattr(trainer, name)]:
        raise InputError(
            f"transformers {transformers.__version__} has no Trainer.{missing[0]}: install a "
            f"version that holdfast[transformers] names"
        )
    for callback in trainer.callback_handler.callbacks:
        if not _has_state(callback):
            require_told_state(
                callback, trainer.model, "state_dict and load_state_dict, or ExportableState"
            )
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    kept = {
        "model": trainer.accelerator.unwrap_model(trainer.model),
        "optimizer": optimizer,
        "scheduler": trainer.lr_scheduler,
        TRAINER: state,
    }
    scaler = trainer.accelerator.scaler
    return kept if scaler is None else {**kept, "scaler": scaler}


def _has_state(callback: Any) -> bool:
    return isinstance(callback, ExportableState) or (
        hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
    )


def _told(callback: Any) -> Mapping[str, Any]:
    if hasattr(callback, "state_dict"):
        told: Mapping[str, Any] = callback.state_dict()
    else:
        told = callback.state()["attributes"]
    return dict(told)


def _restore(callback: Any, told: Mapping[str, Any]) -> None:
    if hasattr(callback, "load_state_dict"):
        callback.load_state_dict(told)
        return
    for name, value in told.items():
        setattr(callback, name, value)


def _of_weights(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.endswith(OF_THE_CLOCK)}


def _unchanged(batch: Any) -> Any:
    return batch


def _problems(trainer: Any, resumed: Any, trial: Any) -> Iterable[str]:
    """What no run is exact with, each with the way out."""
    if trainer._stepped is not None:
        yield "it was called twice in one process: train one run in each process"
    if resumed:
        yield "resume_from_checkpoint: the run goes on by itself; leave it out"
    if trial is not None:
        yield "hyperparameter_search: give each trial a run id and a process of its own"
    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        yield "DeepSpeed, FSDP and several processes are not taken over: start one process"
    if isinstance(trainer.train_dataset, IterableDataset):
        yield "an IterableDataset cannot be gone back into: give items by index"
    yield from _argument_problems(trainer.args)


def _argument_problems(args: Any) -> Iterable[str]:
    if args.n_gpu > 1:
        yield f"{args.n_gpu} GPUs would be one DataParallel: set CUDA_VISIBLE_DEVICES to one"
    if args.load_best_model_at_end or str(args.save_strategy).endswith("best"):
        yield (
            "load_best_model_at_end and save_strategy='best' read Trainer's own checkpoints: leave "
            "them out; the run's checkpoints/ have the metrics of each evaluation"
        )
    if args.auto_find_batch_size:
        yield "auto_find_batch_size: set the batch size that fits"
    if args.enable_jit_checkpoint:
        yield "enable_jit_checkpoint: the run saves at a notice; leave it out"
    if args.ignore_data_skip:
        yield "ignore_data_skip trains on samples twice after a resume: leave it out"
