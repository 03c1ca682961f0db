"""From a champion's file to its artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from holdfast.training.configuration.schema import ExportConfig
from holdfast.training.data.loader import evaluation_batches
from holdfast.training.errors import ExportError
from holdfast.training.experiment.protocol import Experiment, input_names, model_inputs
from holdfast.training.export.capturing import unused_tensors
from holdfast.training.export.formats import formats
from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.interfaces import open_interface
from holdfast.training.export.protocol import Place, Source
from holdfast.training.export.specification import Inputs, Interface, fits, sizes_by_name
from holdfast.training.export.weights import load_champion

NUM_EXAMPLES = 2
SHAPE_BATCH_SIZE = 8
NUM_SHAPE_BATCHES = 8
CALIBRATION_BATCH_SIZE = 64


def open_champion(
    experiment: Experiment, champion: Path, config: ExportConfig, bundle: Path, scratch: Path
) -> tuple[Source, Place]:
    """The champion of a file, and the folders that its artifacts go to, which are created.

    Raises ExportError if the file does not fit the experiment's model, or its samples are of
    several shapes.
    """
    for folder in (bundle, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(champion, scratch / "champion.safetensors")
    model = load_champion(champion, experiment.model())
    opened = open_interface(experiment, model, NUM_EXAMPLES)
    interface = opened.interface
    require_shapes(experiment, interface)
    source = Source(
        model=GuardedModel(model, opened.form).eval(),
        interface=interface,
        examples=opened.examples,
        max_batch_size=config.max_batch_size,
        calibration=Calibration(experiment, config.num_calibration),
    )
    return source, Place(bundle, scratch, experiment.model, interface)


def require_shapes(experiment: Experiment, interface: Interface) -> None:
    """Make sure that samples of several validation batches have the shapes of the interface.

    Raises ExportError: beside the number of samples only the sizes vary that have a name.
    """
    dataset, names = experiment.dataset("validation"), input_names(experiment)
    batches = evaluation_batches(dataset, SHAPE_BATCH_SIZE)
    for batch in islice(batches, NUM_SHAPE_BATCHES):
        inputs = model_inputs(batch, names)
        for port, tensor in zip(interface.inputs, inputs, strict=False):
            if not fits(tensor.shape[1:], port.shape):
                raise ExportError(
                    f"samples of the input {port.name} have the shape {list(port.shape)} in one "
                    f"validation batch and {list(tensor.shape[1:])} in another; in an export only "
                    f"the number of samples may vary, and what dynamic_dimensions of the "
                    f"experiment names: pad them to one length that doesn't depend on the batch, "
                    f'or declare it, as {{"{port.name}": {{1: "length"}}}}'
                )
        if len(inputs) == len(interface.inputs):
            sizes_by_name(interface.inputs, inputs)


def chosen_formats(config: ExportConfig) -> tuple[str, ...]:
    """The configured formats in the order in which they are made.

    Weights always, and ONNX where int8 is made from it.
    """
    wanted = {"weights", *config.formats, *(["onnx"] if "onnx_int8" in config.formats else [])}
    return tuple(name for name in formats() if name in wanted)


def write_artifacts(
    source: Source,
    place: Place,
    names: tuple[str, ...],
    before_each: Callable[[str], bool] = lambda _: True,
) -> bool:
    """Write each format; False where ``before_each(name)`` said to stop."""
    table = formats()
    for name in names:
        if not before_each(name):
            return False
        table[name].write(source, place)
    unused = sorted(unused_tensors(source.program))
    (place.scratch / "unused.txt").write_text("\n".join(unused))
    return True


@dataclass(frozen=True)
class Calibration:
    """Batches of the first training inputs, the same on every call."""

    experiment: Experiment
    num_samples: int

    def __call__(self) -> Iterator[Inputs]:
        """Batches until at least ``num_samples`` samples were given, or the data end."""
        num_given = 0
        with torch.random.fork_rng(devices=[]):
            training, names = self.experiment.dataset("train"), input_names(self.experiment)
            for batch in evaluation_batches(training, CALIBRATION_BATCH_SIZE):
                if num_given >= self.num_samples:
                    return
                inputs = model_inputs(batch, names)
                num_given += len(inputs[0])
                yield inputs
