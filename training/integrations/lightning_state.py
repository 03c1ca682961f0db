"""Where Lightning's loops stand, what callbacks keep, and what was logged so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loops import _Loop
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor
from torchmetrics import Metric

LOGGED = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
OF_THE_BATCH = ("_first_loop_iter", "_current_fx")
SUMS = ("value", "cumulated_batch_size")
IS_MODEL = {"is": "the model"}
"""In the place of what is saved with the model already."""


class TrainerPart:
    """All that Lightning's own checkpoint has beside weights, optimizers and schedulers, and more.

    Callbacks that write checkpoints are left out: their state is paths of this machine.
    """

    def __init__(self, trainer: Any, own: Callback) -> None:
        self._trainer, self._own = trainer, own
        self.is_over = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        trainer = self._trainer
        connector = trainer._logger_connector
        return {
            "loops": _plain(trainer.fit_loop.state_dict()),
            "should_stop": trainer.should_stop,
            "is_over": self.is_over,
            "saved": self._saved(),
            "logged": {name: dict(getattr(connector, name)) for name in LOGGED},
            "batch": {name: getattr(connector, name) for name in OF_THE_BATCH},
            "results": _sums(trainer.fit_loop.epoch_loop._results),
            "metrics": {name: _metric_state(metric) for name, metric in self._metrics()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put everything back; the model was before."""
        trainer = self._trainer
        restore_place(trainer, saved)
        if (fetcher := trainer.fit_loop._data_fetcher) is not None:  # None: all is trained
            fetcher.fetched = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        connector = trainer._logger_connector
        device = trainer.strategy.root_device
        for name, value in saved["logged"].items():
            setattr(connector, name, {k: _moved(v, device) for k, v in value.items()})
        for name, value in saved["batch"].items():
            setattr(connector, name, value)
        trainer.fit_loop.epoch_loop._results = _ResumedResults(saved["results"], device)
        for name, metric in self._metrics():
            _restore_metric(metric, saved["metrics"][name], device)
        self._load(saved["saved"])

    def _saved(self) -> dict[str, Any]:
        """What callbacks and the module add to a checkpoint of Lightning's."""
        checkpoint = self._checkpoint()
        weights, before = checkpoint["state_dict"], dict(checkpoint)
        for callback in self._callbacks():
            callback.on_save_checkpoint(self._trainer, self._trainer.lightning_module, checkpoint)
        self._trainer.lightning_module.on_save_checkpoint(checkpoint)
        told = {
            name: IS_MODEL if value is weights else value
            for name, value in checkpoint.items()
            if value is not before.get(name)
        }
        told["callbacks"] = {c.state_key: c.state_dict() for c in self._callbacks()}
        if self._trainer.datamodule is not None:
            told["datamodule"] = self._trainer.datamodule.state_dict()
        return told

    def _load(self, told: Mapping[str, Any]) -> None:
        told = dict(told)
        if self._trainer.datamodule is not None:
            self._trainer.datamodule.load_state_dict(told.pop("datamodule"))
        checkpoint = self._checkpoint()
        weights = checkpoint["state_dict"]
        checkpoint |= {name: weights if v == IS_MODEL else v for name, v in told.items()}
        self._trainer.lightning_module.on_load_checkpoint(checkpoint)
        for callback in self._callbacks():
            callback.on_load_checkpoint(self._trainer, self._trainer.lightning_module, checkpoint)
            if state := told["callbacks"].get(callback.state_key):
                callback.load_state_dict(state)

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "epoch": self._trainer.current_epoch,
            "global_step": self._trainer.global_step,
            "pytorch-lightning_version": pl.__version__,
            "state_dict": self._trainer.lightning_module.state_dict(),
        }

    def _callbacks(self) -> list[Callback]:
        return [
            callback
            for callback in self._trainer.callbacks
            if callback is not self._own and not isinstance(callback, Checkpoint)
        ]

    def _metrics(self) -> Iterator[tuple[str, Metric]]:
        for name, module in self._trainer.lightning_module.named_modules():
            if isinstance(module, Metric):
                yield name, module


def restore_place(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Let the loops stand where a state was taken, without the detours of a restart."""
    trainer.should_stop = saved["should_stop"] or saved["is_over"]
    trainer.fit_loop.load_state_dict(saved["loops"])
    for loop in _loops(trainer.fit_loop):
        loop.on_iteration_done()  # it is restarting no more


def told_metrics(trainer: Any) -> dict[str, float]:
    """What callbacks see after a validation."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class _ResumedResults(_ResultCollection):  # type: ignore[misc]
    """What is logged, with the sums of the epoch that is gone on with."""

    def __init__(self, sums: Mapping[str, Mapping[str, Tensor]], device: Any) -> None:
        super().__init__(training=True)
        self.sums, self._device = dict(sums), device  # those that were not logged again so far

    def __setitem__(self, key: str, metric: Any) -> None:
        """A name is logged for the first time in this process."""
        for name, value in self.sums.pop(key, {}).items():
            setattr(metric, name, value.to(self._device))
        super().__setitem__(key, metric)


def _sums(results: Any) -> dict[str, dict[str, Tensor]]:
    return getattr(results, "sums", {}) | {
        key: {name: getattr(metric, name) for name in SUMS if hasattr(metric, name)}
        for key, metric in results.items()
        if metric.is_tensor and not metric.has_reset
    }


def _metric_state(metric: Metric) -> dict[str, Any]:
    return {"num_updates": metric.update_count, "state": dict(metric.metric_state)}


def _restore_metric(metric: Metric, saved: Mapping[str, Any], device: Any) -> None:
    metric.reset()
    for name, value in saved["state"].items():
        is_list = isinstance(value, list)
        moved = [_moved(v, device) for v in value] if is_list else _moved(value, device)
        setattr(metric, name, moved)
    metric._update_count = saved["num_updates"]


def _moved(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _loops(loop: Any) -> Iterator[Any]:
    yield loop
    for inner in vars(loop).values():
        if isinstance(inner, _Loop):
            yield from _loops(inner)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without loaders' own places: the run's loader has its own."""
    return {
        name: {k: v for k, v in value.items() if k != "combined_loader"}
        for name, value in state.items()
    }
