"""The champion as it is exported: flat outputs, and rows that cannot be trusted come out as NaN.

ONNX Runtime's LSTM, GRU and MaxPool swallow a NaN and return plausible numbers where torch
returns NaN. The guard stands in the graph itself, so every consumer of every format has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holdfast.training.experiment.model_call import BY_POSITION, CallForm
from holdfast.training.export.outputs import as_columns, flat_outputs

PREFIX = "model."


class GuardedModel(nn.Module):
    """``model`` with flat outputs ``[B, ...]``.

    A sample with a NaN or an infinity in any floating-point input gets NaN in every floating-point
    output, and in the others -1, the largest number where there are no negative ones, or False. Its
    neighbours get what they would have got without it. State dict keys are the model's own behind
    ``PREFIX``. Inputs are flat, whatever ``form`` the model takes them in.
    """

    def __init__(self, model: nn.Module, form: CallForm = BY_POSITION) -> None:
        super().__init__()
        self.model = model
        self._form = form

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the model's order; ``[B]`` becomes ``[B, 1]``."""
        floating = [tensor for tensor in inputs if tensor.is_floating_point()]
        returned = self._form.call(self.model, [_without_holes(tensor) for tensor in inputs])
        outputs = [as_columns(tensor) for tensor in flat_outputs(returned)]
        if not floating:
            return tuple(outputs)
        is_good = _all_finite(floating[0])
        for tensor in floating[1:]:
            is_good = is_good & _all_finite(tensor)
        return tuple(_only_where(is_good, output) for output in outputs)


class DoublePrecision(TorchFunctionMode):
    """Inside, whatever asks for fp32 gets fp64.

    ``module.double()`` reaches parameters and buffers, but not a ``.float()`` or a
    ``dtype=torch.float32`` in the model's code; with this, the reference is fp64 throughout.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_widened, args), **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _without_holes(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.where(torch.isfinite(tensor), tensor, torch.zeros((), dtype=tensor.dtype))


def _only_where(is_good: Tensor, output: Tensor) -> Tensor:
    if output.dtype == torch.bool:
        missing: float = False
    else:
        missing = float("nan") if output.is_floating_point() else _missing(output.dtype)
    shaped = is_good.view(-1, *[1] * (output.dim() - 1))
    return torch.where(shaped, output, torch.full((), missing, dtype=output.dtype))


def _missing(dtype: torch.dtype) -> int:
    return -1 if dtype.is_signed else int(torch.iinfo(dtype).max)


def _all_finite(tensor: Tensor) -> Tensor:
    """Per sample. Not ``len(tensor)``, which a trace would keep as a constant."""
    is_finite = torch.isfinite(tensor)
    return is_finite if tensor.dim() == 1 else is_finite.flatten(1).all(1)
