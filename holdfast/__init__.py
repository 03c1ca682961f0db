"""Train PyTorch models on machines that may vanish, exactly: bit for bit.

This is the public face: what an experiment is written with, and what may be raised. A name is
imported when it is first used, so that ``import holdfast`` costs nothing.
"""

# Not typing's, which would be imported, perhaps from the folder in which somebody stands.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.training.checkpointing.loading import load_weights
    from holdfast.training.configuration.schema import Section, Split
    from holdfast.training.errors import (
        BundleError,
        CheckpointError,
        ConfigError,
        DataFormatError,
        DataNotFoundError,
        ExperimentError,
        ExportError,
        HoldfastError,
        InputError,
        LeaseError,
        SelectionError,
        StorageError,
        TrainingError,
    )
    from holdfast.training.exactness.versions import holdfast_version
    from holdfast.training.experiment.protocol import (
        Batch,
        Context,
        Dataset,
        Experiment,
        NoSettings,
        Records,
        Step,
        TrainingPlace,
        WeightedBatch,
        collate,
    )
    from holdfast.training.export.parts import InParts, Part
    from holdfast.training.export.specification import ExportSpec
    from holdfast.training.own_loop.run import Run, run
    from holdfast.training.streams.stream_files import StreamFiles

    __version__: str = holdfast_version()

__all__ = [
    "Batch",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "Context",
    "DataFormatError",
    "DataNotFoundError",
    "Dataset",
    "Experiment",
    "ExperimentError",
    "ExportError",
    "ExportSpec",
    "HoldfastError",
    "InParts",
    "InputError",
    "LeaseError",
    "NoSettings",
    "Part",
    "Records",
    "Run",
    "Section",
    "SelectionError",
    "Split",
    "Step",
    "StorageError",
    "StreamFiles",
    "TrainingError",
    "TrainingPlace",
    "WeightedBatch",
    "__version__",
    "collate",
    "load_weights",
    "run",
]

_ROOMS = {
    "checkpointing.loading": ("load_weights",),
    "configuration.schema": ("Section", "Split"),
    "experiment.protocol": (
        "Batch",
        "Context",
        "Dataset",
        "Experiment",
        "NoSettings",
        "Records",
        "TrainingPlace",
        "Step",
        "WeightedBatch",
        "collate",
    ),
    "export.parts": ("InParts", "Part"),
    "export.specification": ("ExportSpec",),
    "own_loop.run": ("Run", "run"),
    "streams.stream_files": ("StreamFiles",),
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from holdfast.training.exactness.versions import holdfast_version

        return holdfast_version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    room = next((room for room, names in _ROOMS.items() if name in names), "errors")
    value: object = getattr(import_module(f"{__name__}.training.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
