"""How a model is called with the inputs of a batch: by position, by keyword, or with one dict.

Whatever is exported takes flat tensors in a fixed order; this says how they become what the model
takes, and back.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from holdfast.training.errors import ExperimentError
from holdfast.training.experiment.protocol import (
    Experiment,
    example_batch,
    input_names,
    inputs_of,
    model_inputs,
)


@dataclass(frozen=True)
class CallForm:
    """How flat inputs are handed to a model.

    Attributes:
        names: of the inputs, where they come in a dict; empty where they come by position.
        is_keyword: the dict's entries are arguments of ``forward``, not one argument together.
        positions: the arguments of ``forward`` in their order, where they come by keyword.
    """

    names: tuple[str, ...] = ()
    is_keyword: bool = False
    positions: tuple[str, ...] = ()

    def call(self, model: nn.Module, flat: Sequence[Tensor]) -> Any:
        """What the model returns for these inputs."""
        if not self.names:
            return model(*flat)
        named = dict(zip(self.names, flat, strict=True))
        return model(**named) if self.is_keyword else model(named)

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The flat inputs of a call of the model, however it was called.

        Raises ExperimentError where the call leaves one out.
        """
        if not self.names:
            return (*args, *kwargs.values())
        is_one_dict = len(args) == 1 and isinstance(args[0], Mapping)
        order = self.positions or self.names
        named = dict(args[0]) if is_one_dict else dict(zip(order, args, strict=False))
        named.update(kwargs)
        if missing := [name for name in self.names if name not in named]:
            raise ExperimentError(
                f"score() calls the model without the input {missing[0]}, which batches have; "
                f"give the model all of {', '.join(self.names)}, or leave it out of the inputs"
            )
        return tuple(named[name] for name in self.names)


BY_POSITION = CallForm()


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What ``forward`` takes; a model that hands its calls on says to whom, by ``called_like``."""
    called_like = getattr(model, "called_like", None)
    called = model if called_like is None else called_like()
    return inspect.signature(called.forward).parameters


def call_form(experiment: Experiment, model: nn.Module) -> CallForm:
    """How the experiment's model takes the inputs of its batches.

    What ``input_names`` names comes by keyword. A dict is spread over the arguments of ``forward``
    where all of its keys are names of them. Raises ExperimentError.
    """
    chosen = input_names(experiment)
    batch = example_batch(experiment, 1)
    model_inputs(batch, chosen)
    inputs = inputs_of(batch, chosen)
    if not isinstance(inputs, Mapping):
        return BY_POSITION
    names = tuple(inputs)
    parameters = forward_parameters(model)
    unknown = [name for name in names if name not in parameters]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if chosen and unknown and not takes_any:
        raise ExperimentError(
            f"input_names names {unknown[0]}, and forward() of {type(model).__name__} takes "
            f"{', '.join(parameters) or 'nothing'}; name arguments that it takes"
        )
    is_keyword = bool(chosen) or not unknown
    return CallForm(names, is_keyword, _positions(parameters) if is_keyword else ())


def _positions(parameters: Mapping[str, inspect.Parameter]) -> tuple[str, ...]:
    """Arguments that may be given by position, unless any number may."""
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return ()
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return tuple(name for name, parameter in parameters.items() if parameter.kind is by_position)
