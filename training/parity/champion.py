"""The champion as the checks see it: rebuilt from its safetensors file, with its own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.data.loader import evaluation_batches
from holdfast.training.exactness.seeding import preserved_generators, seed_scoring
from holdfast.training.experiment.protocol import (
    Experiment,
    MeasuredWhole,
    Records,
    concatenate,
)
from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.interfaces import open_interface
from holdfast.training.export.protocol import Runner
from holdfast.training.export.specification import Inputs, Interface, export_spec
from holdfast.training.export.weights import StoredTensors, load_champion, tied_names
from holdfast.training.loop.evaluation import as_arrays, metrics_of
from holdfast.training.parity.merging import model_apart
from holdfast.training.parity.numbers import Reference, double_copy, make_reference
from holdfast.training.parity.probes import BATCH_SIZES, make_probes


class RunnerModule(nn.Module):
    """Anything that maps inputs to flat outputs, in the place of the model.

    So ``experiment.score`` measures an artifact in the way it measures the champion. ``seen`` keeps
    the flat outputs of every call.
    """

    def __init__(self, run: Runner, interface: Interface) -> None:
        super().__init__()
        # Whoever asks for the model's device finds one.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self._run = run
        self._interface = interface
        self.seen: list[list[Tensor]] = []
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would return, from the runner's flat outputs."""
        given = self._interface.form.flat(args, kwargs)
        flat = self._run(tuple(moved(each, self.place.device) for each in given))
        self.seen.append(flat)
        device = next((each.device for each in given if isinstance(each, Tensor)), None)
        return self._interface.structure.rebuild([moved(each, device) for each in flat])


@dataclass(frozen=True)
class Answers:
    """What artifacts are held to: the champion's weights, and its answers to every probe.

    Attributes:
        tensors: the file's tensors by name, each read when it is asked for.
        names: for each tensor, the names of the same (tied) tensor.
        references: answers by the name of the probe.
        test: answers to each batch of the test set, without their inputs.
        metrics: metrics of the test set by the eager model.
        by_size: inputs of several sizes, where more than the number of samples may vary.
    """

    experiment: Experiment
    interface: Interface
    tensors: Mapping[str, Tensor]
    names: Mapping[str, list[str]]
    references: Mapping[str, Reference]
    test: tuple[Reference, ...]
    metrics: Mapping[str, float]
    batch_size: int
    by_size: Mapping[str, Inputs]


@dataclass(frozen=True)
class Champion(Answers):
    """The answers of the champion and of its fp64 copy, and the eager model that gave them."""

    eager: GuardedModel

    @classmethod
    def load(
        cls,
        experiment: Experiment,
        path: Path,
        batch_size: int,
        report: Callable[[str], None] = lambda _: None,
    ) -> Champion:
        """Rebuild the champion and let it answer. Raises ExportError if the file doesn't fit."""
        exported = load_champion(path, experiment.model())
        names = tied_names(exported)
        model = model_apart(experiment, path) or exported  # what is exported answers as it does
        opened = open_interface(experiment, model, max(BATCH_SIZES))
        interface = opened.interface
        eager = GuardedModel(model, opened.form).eval()
        exact = double_copy(eager)
        report("the champion answers the probes")
        own = {**opened.by_size, **export_spec(experiment).probes}
        probes = make_probes(opened.rows, own)
        references = {name: make_reference(eager, exact, x) for name, x in probes.items()}
        report("the champion answers the test set")
        test: list[Reference] = []

        def answer(inputs: Inputs) -> list[Tensor]:
            reference = make_reference(eager, exact, inputs)
            test.append(replace(reference, inputs=()))
            return reference.eager

        records, _ = score_test_set(experiment, interface, answer, batch_size)
        return cls(
            experiment=experiment,
            interface=interface,
            eager=eager,
            tensors=StoredTensors(path),
            names=names,
            references=references,
            test=tuple(test),
            metrics=metrics_of(experiment, records),
            batch_size=batch_size,
            by_size=opened.by_size,
        )

    def answers(self) -> Answers:
        """Without the model, which only the checks of the champion itself need."""
        return Answers(**{each.name: getattr(self, each.name) for each in fields(Answers)})


def moved(value: Any, device: torch.device | None) -> Any:
    """A tensor on a device; whatever else as it is. A runner's own place is the CPU."""
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


def score_test_set(
    experiment: Experiment, interface: Interface, run: Runner, batch_size: int
) -> tuple[Records, list[list[Tensor]]]:
    """Records of the whole test set, and the flat outputs of every batch.

    What scoring draws is what it drew when the champion was evaluated.
    """
    module = RunnerModule(run, interface)
    parts = []
    dataset = experiment.dataset("test")
    with preserved_generators(), torch.no_grad():
        if isinstance(dataset, MeasuredWhole):
            seed_scoring(0)
            return dataset.measured(module), module.seen
        for number, batch in enumerate(evaluation_batches(dataset, batch_size)):
            seed_scoring(number)
            scored = experiment.score(module, batch)
            parts.append(as_arrays(scored))
    return concatenate(parts), module.seen
