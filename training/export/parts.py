"""Models that are served as several graphs, such as an encoder and one step of a decoder.

An experiment may have three more methods, those of ``InParts``. Each part is the champion's weights
behind another ``forward``. It is exported to ``parts/<name>/`` in the formats of the bundle and is
held to the same checks as the model itself, on inputs that were recorded while the parts worked
together; what the parts do together is compared on the whole test set: see ``assembly.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from holdfast.training.configuration.schema import ExportConfig, Split
from holdfast.training.data.loader import evaluation_batches
from holdfast.training.experiment.protocol import Batch, Experiment, Records
from holdfast.training.export.artifacts import open_champion, write_artifacts
from holdfast.training.export.formats import formats
from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.outputs import flat_outputs
from holdfast.training.export.protocol import Runner
from holdfast.training.export.serving import triton_config
from holdfast.training.export.specification import ExportSpec, Inputs, Interface
from holdfast.training.export.weights import load_champion

FOLDER = "parts"
OF_THE_WHOLE = ("weights", "onnx_int8")
"""Formats that parts do not have: the weights are the champion's, and int8 has a metric to keep."""
BATCH_SIZE = 32
NUM_RECORDED = 192
LEAST_RECORDED = 33  # as many as the largest of the probes has
RECORDED_BYTES = 16 * 2**20
"""With what the part returns. Where samples take more, such as a decoder's caches, it is fewer."""


@dataclass(frozen=True)
class Part:
    """One graph.

    Attributes:
        build: a fresh module whose state dict has the names of the experiment's model.
        input_names, output_names: one for each argument and each returned tensor.
        probes: further inputs that parity must hold on.
    """

    build: Callable[[], nn.Module]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    probes: Mapping[str, Inputs] = field(default_factory=dict)


@runtime_checkable
class InParts(Protocol):
    """What an experiment has whose model is served as several graphs."""

    def export_parts(self) -> Mapping[str, Part]:
        """The graphs by name."""
        ...

    def assemble(self, runs: Mapping[str, Runner], batch: Batch) -> Mapping[str, Tensor]:
        """Records of a batch, as ``score`` gives them, by the parts alone."""
        ...

    def export_files(self) -> Mapping[str, bytes]:
        """Further files of the bundle that a user of the parts needs, such as a vocabulary."""
        ...


class PartExperiment:
    """A part as an experiment of its own, for the exporters and the checks.

    Its data are the inputs that the part was given while the champion's parts worked together on
    the first batches of a split.
    """

    def __init__(self, experiment: Experiment, name: str, champion: Path) -> None:
        assert isinstance(experiment, InParts)
        self._experiment, self._name = experiment, name
        self._champion = champion
        self._part = experiment.export_parts()[name]
        self._sizes: dict[Split, list[tuple[int, int]]] = {}

    def dataset(self, split: Split) -> RecordedInputs:
        """Recorded inputs; each sample's target is nothing but its number.

        The first time the parts work together twice: which samples are taken is known once all
        calls were seen, and to hold all of them takes more than anything else.
        """
        if split not in self._sizes:
            sizes = self._sizes[split] = []
            self._work_together(split, lambda *call: sizes.append(_size(*call)))
        num_samples, num_bytes = map(sum, zip(*self._sizes[split], strict=True))
        fitting = RECORDED_BYTES * num_samples // max(num_bytes, 1)
        num_taken = min(NUM_RECORDED, max(LEAST_RECORDED, fitting))
        spread = torch.linspace(0, num_samples - 1, num_taken).long()
        taken: list[Inputs] = []
        num_seen = 0

        def take(inputs: Inputs, _: Sequence[Tensor]) -> None:
            nonlocal num_seen
            first, num_seen = num_seen, num_seen + len(inputs[0])
            rows = spread[(spread >= first) & (spread < num_seen)] - first
            taken.append(tuple(tensor[rows] for tensor in inputs))

        self._work_together(split, take)
        return RecordedInputs([torch.cat(column) for column in zip(*taken, strict=True)])

    def _work_together(
        self, split: Split, told: Callable[[Inputs, Sequence[Tensor]], None]
    ) -> None:
        """Tell of each call of this part, until it was given ``NUM_RECORDED`` samples."""
        runs = eager_runs(self._experiment, self._champion)
        num_samples = 0

        def recorded(inputs: Inputs) -> list[Tensor]:
            nonlocal num_samples
            num_samples += len(inputs[0])
            outputs = runs[self._name](inputs)
            told(inputs, outputs)
            return outputs

        assert isinstance(self._experiment, InParts)
        for batch in evaluation_batches(self._experiment.dataset(split), BATCH_SIZE):
            self._experiment.assemble({**runs, self._name: recorded}, batch)
            if num_samples >= NUM_RECORDED:
                break

    def model(self) -> nn.Module:
        """The part's module."""
        return self._part.build()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:  # noqa: ARG002  # the protocol's
        """Parts are not trained."""
        raise AssertionError(f"part {self._name} is not trained")

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Runs the part; its outputs are compared as numbers, there is no metric."""
        return {"first": flat_outputs(model(*batch[0]))[0].flatten(1)[:, 0]}

    def metrics(self, records: Records) -> dict[str, float]:  # noqa: ARG002  # the protocol's
        """None."""
        return {}

    def export_spec(self) -> ExportSpec:
        """The names and probes of the part."""
        part = self._part
        return ExportSpec(part.input_names, part.output_names, probes=part.probes)


class RecordedInputs:
    """Inputs that a part was given."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitem__(self, index: int) -> tuple[Inputs, int]:
        return tuple(tensor[index] for tensor in self._tensors), index


def _size(inputs: Inputs, outputs: Sequence[Tensor]) -> tuple[int, int]:
    """Samples of a call, and bytes of all that went in and came out."""
    return len(inputs[0]), sum(tensor.nbytes for tensor in (*inputs, *outputs))


def part_names(experiment: Experiment) -> tuple[str, ...]:
    """Names of the parts; none where the model is served as one graph."""
    return tuple(experiment.export_parts()) if isinstance(experiment, InParts) else ()


def part_formats(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the bundle's formats that parts have."""
    return tuple(name for name in names if name not in OF_THE_WHOLE)


def part_artifacts(experiment: Experiment, names: Sequence[str]) -> dict[str, str]:
    """``<part>.<format>`` of all that is exported of parts, with its path in a bundle."""
    return {
        f"{part}.{name}": artifact_path(part, name)
        for part in part_names(experiment)
        for name in part_formats(names)
    }


def artifact_path(part: str, form: str) -> str:
    """Where the artifact of a part lies in a bundle."""
    return f"{FOLDER}/{part}/{formats()[form].path}"


def graph_of(
    experiment: Experiment, part: str, champion: Path, folders: tuple[Path, Path]
) -> tuple[Experiment, tuple[Path, Path]]:
    """A part as an experiment of its own, and its folders in bundle and scratch.

    The empty name stands for the whole model.
    """
    if not part:
        return experiment, folders
    bundle, scratch = (folder / FOLDER / part for folder in folders)
    return PartExperiment(experiment, part, champion), (bundle, scratch)


def eager_runs(experiment: Experiment, champion: Path) -> dict[str, Runner]:
    """The champion's parts in PyTorch, guarded as they are exported."""
    assert isinstance(experiment, InParts)
    return {
        name: _runner(GuardedModel(load_champion(champion, part.build())).eval())
        for name, part in experiment.export_parts().items()
    }


def write_parts(
    experiment: Experiment,
    champion: Path,
    config: ExportConfig,
    folders: tuple[Path, Path],
    names: Sequence[str],
    before_each: Callable[[str], bool] = lambda _: True,
) -> dict[str, Interface] | None:
    """Write every part in the given formats, below ``parts/`` of the bundle and of scratch.

    Returns the interfaces; None where ``before_each(part)`` said to stop. Raises ExportError where
    a part cannot be exported.
    """
    interfaces = {}
    for part in part_names(experiment):
        if not before_each(part):
            return None
        graph = graph_of(experiment, part, champion, folders)
        interfaces[part] = _write_part(*graph, champion, config, names)
    if isinstance(experiment, InParts):
        for name, content in experiment.export_files().items():
            (folders[0] / name).write_bytes(content)
    return interfaces


def _write_part(
    alone: Experiment,
    folders: tuple[Path, Path],
    champion: Path,
    config: ExportConfig,
    names: Sequence[str],
) -> Interface:
    source, place = open_champion(alone, champion, config, *folders)
    write_artifacts(source, place, part_formats(names))
    if "onnx" in names:
        text = triton_config(source.interface, config.max_batch_size)
        (place.bundle / "config.pbtxt").write_text(text)
    return source.interface


def _runner(model: nn.Module) -> Runner:
    def run(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return list(model(*inputs))

    return run
