"""What a script hands over for all that follows training, in the place of an experiment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from holdfast.training.configuration.schema import Split
from holdfast.training.errors import ExperimentError, InputError, kind_of
from holdfast.training.experiment.nests import mapped
from holdfast.training.experiment.protocol import Batch, Records
from holdfast.training.export.specification import Dimensions, ExportSpec
from holdfast.training.loop.evaluation import as_arrays
from holdfast.training.loop.experiment_state import Stateful
from holdfast.training.own_loop import arguments

Evaluate = Callable[..., Any]
Metrics = Callable[[Records], Mapping[str, float]]
Build = nn.Module | Callable[[], nn.Module]


class Examples:
    """Example inputs as a data set; on the split itself a script measures a model by itself.

    Attributes:
        fingerprint: of the code that measures.
        measured: records of a model on the whole split.
    """

    def __init__(
        self, inputs: Any, fingerprint: str | None, measured: Callable[[nn.Module], Records]
    ) -> None:
        # As a batch has them: a list is a tuple.
        taken = tuple(inputs) if isinstance(inputs, list) else inputs
        self._inputs = mapped(lambda tensor: tensor.detach().cpu(), taken)
        self.fingerprint = fingerprint
        self.measured = measured

    def __len__(self) -> int:
        return len(_flat(self._inputs)[0])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The inputs of one sample; its target is nothing but its number."""
        return mapped(lambda tensor: tensor[index], self._inputs), index


@dataclass
class HandedOver:
    """What ``run.champion`` was given, as the stages after training see an experiment.

    Attributes:
        build: a model as it was kept, or a function that makes one.
        evaluate: of the script.
        inputs: a tensor, a tuple or a dict of tensors, whose first dimension counts samples.
        metric: what a lone number is called: ``selection.metric``.
        whole: the state that the script keeps, beside models and optimizers.
        own_metrics: metrics from records, where the mean of each is not meant.
        spec: names of inputs, outputs and classes, and what else an export says.
        dynamic_dimensions: of inputs.
        fingerprint: of the script's code.
        device_type: where it trains.
    """

    build: Build | None
    evaluate: Evaluate | None
    inputs: Any
    metric: str
    whole: Stateful
    own_metrics: Metrics | None = None
    spec: ExportSpec = field(default_factory=ExportSpec)
    dynamic_dimensions: Dimensions = field(default_factory=dict)
    fingerprint: str | None = None
    device_type: Literal["cpu", "cuda"] = "cpu"

    @property
    def has_test(self) -> bool:
        """Whether ``evaluate`` takes a split, and so has test data."""
        assert self.evaluate is not None
        return num_arguments(self.evaluate) > 1

    def dataset(self, split: Split) -> Examples:
        """The examples, and what measures a model on a split."""
        return Examples(self.inputs, self.fingerprint, lambda model: self.measured(model, split))

    def model(self) -> nn.Module:
        """A model without the weights that were trained, on the CPU."""
        assert self.build is not None
        built = copy.deepcopy(self.build) if isinstance(self.build, nn.Module) else self.build()
        if not isinstance(built, nn.Module):
            raise InputError(
                f"run.champion(model=…): the function returned {kind_of(built)}; expected "
                f"a module as it was kept"
            )
        return getattr(built, "_orig_mod", built).to("cpu")

    def measured(self, model: nn.Module, split: Split) -> Records:
        """Records of a model on a split; one row of numbers where the script returns metrics.

        Without test data the validation data are taken. Raises ExperimentError for what
        ``evaluate`` must not return.
        """
        assert self.evaluate is not None
        asked = (model, split) if self.has_test else (model,)
        return self._records(self.evaluate(*asked), split)

    def metrics(self, records: Records) -> dict[str, float]:
        """The mean of each record, or what the script makes of them."""
        if self.own_metrics is not None and not is_lone(records):
            return dict(self.own_metrics(records))
        return {name: float(values.mean(dtype=np.float64)) for name, values in records.items()}

    def export_spec(self) -> ExportSpec:
        """What the script says about its export."""
        return self.spec

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:  # noqa: ARG002  # the protocol's
        """The script has trained."""
        raise AssertionError("a script's own loop computes its losses")

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:  # noqa: ARG002
        """A split is measured as a whole."""
        raise AssertionError("a script measures a split by itself")

    def state_dict(self) -> Mapping[str, Any]:
        """As the script keeps it."""
        return self.whole.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back to the script."""
        self.whole.load_state_dict(state)

    def _records(self, returned: Any, split: Split) -> Records:
        told = f"evaluate(model, {split!r})" if self.has_test else "evaluate(model)"
        number = returned
        if isinstance(number, (Tensor, np.ndarray, np.generic)) and number.ndim == 0:
            number = number.item()
        if isinstance(number, (int, float)):
            returned = {self.metric: number}
        if not isinstance(returned, Mapping) or not returned:
            raise ExperimentError(
                f"{told} must return a number, a dict of numbers, or a dict of tensors with one "
                f"row for each sample; it returned {_described(returned)}"
            )
        arrays = {str(name): _array(told, name, value) for name, value in returned.items()}
        lengths = {name: None if array.ndim == 0 else len(array) for name, array in arrays.items()}
        if len({*lengths.values()}) > 1 or 0 in lengths.values():
            raise ExperimentError(
                f"{told} must return numbers alone, or tensors with as many rows each as there are "
                f"samples; it returned {_lengths(lengths)}"
            )
        records = {name: array.reshape(-1) if array.ndim == 0 else array
                   for name, array in arrays.items()}  # fmt: skip
        if self.own_metrics is None and any(array.ndim > 1 for array in records.values()):
            wide = next(name for name, array in records.items() if array.ndim > 1)
            raise ExperimentError(
                f"{told} must return one number for each sample; {wide!r} has rows of shape "
                f"{list(records[wide].shape[1:])}: reduce them, or say what the metrics of such "
                f"records are with run.champion(metrics=…)"
            )
        return records


def is_lone(records: Records) -> bool:
    """Whether records are metrics, of which nothing is known for each sample."""
    return all(len(values) == 1 for values in records.values())


def require_usable(handed: HandedOver, kept: nn.Module) -> None:
    """Raise InputError, which says what was expected, for what cannot stand for an experiment.

    Args:
        handed: what the script hands over.
        kept: all modules that the run keeps.
    """
    build, evaluate = handed.build, handed.evaluate
    if not callable(build):
        raise InputError(
            f"run.champion(model=…): expected the model that is kept, or a function that makes one "
            f"like it, found {kind_of(build)}"
        )
    if not callable(evaluate) or not 1 <= num_arguments(evaluate) <= 2:
        raise InputError(
            "run.champion(evaluate=…): expected a function of (model), or of (model, split) with "
            "the split 'validation' or 'test'"
        )
    arguments.function("run.champion(metrics=…)", handed.own_metrics)
    _require_inputs(handed.inputs)
    if not isinstance(handed.spec, ExportSpec):
        raise InputError(
            f"run.champion(spec=…): expected a holdfast.ExportSpec, found "
            f"{arguments.found(handed.spec)}"
        )
    dimensions = "sizes by the names of inputs"
    arguments.mapping("run.champion(dynamic_dimensions=…)", handed.dynamic_dimensions, dimensions)
    _require_same_names(handed.model(), kept)


def num_arguments(function: Callable[..., Any]) -> int:
    """How many arguments a function takes by position; 2 where that is not told."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    takes_any = any(one.kind is Parameter.VAR_POSITIONAL for one in parameters)
    # Those with a default are the script's own: evaluate(model, num_batches=10).
    named = [
        one for one in parameters
        if one.kind in kinds and (one.default is Parameter.empty or one.name == "split")
    ]  # fmt: skip
    return 2 if takes_any else len(named)


def _require_inputs(inputs: Any) -> None:
    flat = _flat(inputs)
    are_tensors = flat and all(isinstance(one, Tensor) and one.dim() > 0 for one in flat)
    if not are_tensors or len({len(one) for one in flat}) > 1 or not len(flat[0]):
        raise InputError(
            f"run.champion(example_inputs=…): expected what the model is called with, for some "
            f"samples: a tensor, a tuple or a dict of tensors whose first dimension counts "
            f"samples; found {_described(inputs)}"
        )


def _flat(inputs: Any) -> Sequence[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]


def _require_same_names(model: nn.Module, kept: nn.Module) -> None:
    """Weights are loaded by name: what is trained must be what is exported."""
    there, here = (
        {name: list(tensor.shape) for name, tensor in one.state_dict().items()
         if isinstance(tensor, Tensor)} for one in (kept, model)
    )  # fmt: skip
    if there == here:
        return
    name = min(name for name in {*there, *here} if there.get(name) != here.get(name))
    several = list(kept.keys()) if isinstance(kept, nn.ModuleDict) else []
    way_out = (
        f"return a module that has all kept ones as attributes: {', '.join(several)}"
        if several
        else "return a module as it was kept"
    )
    raise InputError(
        f"run.champion(model=…): {name} has the shape {here.get(name, 'of none')} in it, and "
        f"{there.get(name, 'of none')} in what is kept: {way_out}"
    )


def _array(told: str, name: object, value: Any) -> Any:
    if isinstance(value, Tensor):
        return as_arrays({"": value})[""]
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind not in "fiub":
        raise ExperimentError(
            f"{told} must return numbers, or tensors with one row for each sample; {name!r} is "
            f"{_described(value)}"
        )
    return array


def _described(value: object) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (str, int, float, Mapping)) or value is None:
        return repr(value)[:80]
    return kind_of(value)


def _lengths(lengths: Mapping[str, int | None]) -> str:
    told = (f"{name} with {n} rows" if n is not None else f"the number {name}"
            for name, n in lengths.items())  # fmt: skip
    return ", ".join(told)
