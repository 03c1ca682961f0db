"""Wrong exports, each made on purpose: what an exporter, or whoever calls it, gets wrong.

Every fault takes a healthy model and gives the source that a broken exporter would have written
its artifacts from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.protocol import Source


@dataclass(frozen=True)
class Fault:
    experiment: str
    apply: Callable[[Source], Source]
    formats: tuple[str, ...] = ("onnx", "torchscript")


class TrainingBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return functional.batch_norm(input, None, None, self.weight, self.bias, training=True)


class TrainingDropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        # Spelt out, because torch.onnx turns a dropout that is left on into nothing.
        kept = torch.rand_like(input) > self.p
        return input * kept.to(input.dtype) / (1 - self.p)


def with_forward(source: Source, forward: Callable[..., Any]) -> Source:
    """The same weights with another ``forward(model, *inputs)``."""
    model = copy.deepcopy(source.model.model)
    model.__class__ = type("Faulty", (type(model),), {"forward": forward})
    return replace(source, model=GuardedModel(model).eval())


def with_change(source: Source, change: Callable[[Any], None]) -> Source:
    """A changed copy of the model."""
    model = copy.deepcopy(source.model.model)
    with torch.no_grad():
        change(model)
    return replace(source, model=GuardedModel(model).eval())


def batch_norm_in_train_mode(source: Source) -> Source:
    def change(model: Any) -> None:
        model.norm.__class__ = TrainingBatchNorm

    return with_change(source, change)


def dropout_in_train_mode(source: Source) -> Source:
    def change(model: Any) -> None:
        model.dropout.__class__ = TrainingDropout

    return with_change(source, change)


def baked_batch(source: Source) -> Source:
    faulty = replace(source)
    program = torch.export.export(source.model, source.examples)
    faulty.__dict__["program"] = program
    return faulty


def baked_batch_in_trace(source: Source) -> Source:
    def forward(self: Any, images: Tensor) -> dict[str, Tensor]:
        features = functional.relu(self.norm(self.convolution(self.scaled(images))))
        features = functional.max_pool2d(features, 3).reshape(2, -1)
        return {"logits": self.classifier(features), "amount": self.amount(features)[:, 0]}

    faulty = with_forward(source, forward)
    # The capture would refuse it; the trace does not, and here it has to be the gate that does.
    faulty.__dict__["program"] = source.program
    return faulty


def sequence_logits(model: Any, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
    weights = mask.to(hidden.dtype)[..., None]
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return {"logits": model.classifier(model.norm(mean))}


def baked_mask(source: Source) -> Source:
    example = source.examples[1][:1].clone()

    def forward(self: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden, _ = self.lstm(self.embedding(ids))
        return sequence_logits(self, hidden, example.expand_as(mask) | torch.zeros_like(mask))

    return with_forward(source, forward)


def dropped_mask(source: Source) -> Source:
    def forward(self: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden, _ = self.lstm(self.embedding(ids))
        return sequence_logits(self, hidden, torch.ones_like(mask))

    return with_forward(source, forward)


def baked_lstm_state(source: Source) -> Source:
    """The state that the last batch left behind, instead of zeros."""
    state = torch.full((2, 1, 8), 0.1)

    def forward(self: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        first = state.expand(2, ids.shape[0], 8).contiguous()
        hidden, _ = self.lstm(self.embedding(ids), (first, first))
        return sequence_logits(self, hidden, mask)

    return with_forward(source, forward)


def int32_ids(source: Source) -> Source:
    ids, mask = source.examples
    return replace(source, examples=(ids.int(), mask))


def one_perturbed_weight(source: Source) -> Source:
    def change(model: Any) -> None:
        model.lstm.weight_hh_l0[3, 2] += 1e-6

    return with_change(source, change)


def stale_weights(source: Source) -> Source:
    def change(model: Any) -> None:
        generator = torch.Generator().manual_seed(9)
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=generator))

    return with_change(source, change)


def changed_eps(source: Source) -> Source:
    def change(model: Any) -> None:
        model.norm.eps = 1e-4

    return with_change(source, change)


def swapped_outputs(source: Source) -> Source:
    def forward(self: Any, images: Tensor) -> dict[str, Tensor]:
        own = type(self).__mro__[1].forward(self, images)
        return {"logits": own["logits"].flip(1), "amount": own["amount"]}

    return with_forward(source, forward)


def swapped_output_order(source: Source) -> Source:
    def forward(self: Any, images: Tensor) -> dict[str, Tensor]:
        own = type(self).__mro__[1].forward(self, images)
        return {"amount": own["amount"], "logits": own["logits"]}

    return with_forward(source, forward)


def missing_scaler(source: Source) -> Source:
    def change(model: Any) -> None:
        model.scaled = lambda images: images

    return with_change(source, change)


def missing_guard(source: Source) -> Source:
    class Unguarded(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            own = self.model(*inputs)
            return own["logits"], own["amount"][:, None]

    faulty: Any = Unguarded(copy.deepcopy(source.model.model)).eval()
    return replace(source, model=faulty)


FAULTS = {
    "batch norm in train mode": Fault("Pictures", batch_norm_in_train_mode),
    "dropout in train mode": Fault("Pictures", dropout_in_train_mode),
    "baked batch": Fault("Pictures", baked_batch, ("onnx", "exported_program")),
    "baked batch in a trace": Fault("Pictures", baked_batch_in_trace, ("torchscript",)),
    "baked mask": Fault("Sequences", baked_mask),
    "dropped mask": Fault("Sequences", dropped_mask),
    "baked LSTM state": Fault("Sequences", baked_lstm_state),
    "int32 ids": Fault("Sequences", int32_ids, ("onnx", "exported_program")),
    "one perturbed weight": Fault("Sequences", one_perturbed_weight),
    "stale weights": Fault("Sequences", stale_weights),
    "changed eps": Fault("Pictures", changed_eps),
    "swapped classes": Fault("Pictures", swapped_outputs),
    "swapped outputs": Fault("Pictures", swapped_output_order),
    "missing scaler": Fault("Pictures", missing_scaler),
    "missing guard": Fault("Pictures", missing_guard, ("onnx",)),
}
