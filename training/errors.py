"""Every error that Holdfast raises on purpose.

::

    HoldfastError
    ├── InputError (ValueError)                 the user's input; exit code 2
    │   ├── ConfigError                         a key or value of the configuration
    │   ├── ExperimentError                     an experiment that cannot be found or loaded
    │   ├── DataNotFoundError (FileNotFoundError)
    │   ├── DataFormatError                     a data file that is not what it should be
    │   ├── RunConflictError                    the run id exists with another configuration
    │   └── InexactError                        a warning about exactness, where --strict is given
    ├── StorageError (OSError)                  bytes could not be read or written
    │   └── StorageFullError                    needed and free bytes are known
    ├── CheckpointError
    │   ├── CheckpointNotFoundError (FileNotFoundError)
    │   ├── CheckpointCorruptError              bytes differ from what the manifest says
    │   ├── CheckpointMismatchError             made by another configuration or model
    │   └── UnsupportedStateError (TypeError)   state that is neither tensor nor JSON
    ├── LeaseError
    │   ├── LeaseHeldError                      another segment writes this run
    │   └── LeaseLostError                      this segment is no longer the writer
    ├── TrainingError
    │   ├── LoaderError                         a sample could not be fetched; a loader process died
    │   ├── NonFiniteLossError (ArithmeticError)
    │   ├── LossJumpError (ArithmeticError)     a loss far above those before, or one spike too many
    │   ├── NonFiniteStateError (ArithmeticError)  optimizer, weights or averages hold NaN
    │   ├── OutOfMemoryError (MemoryError)
    │   └── RankLostError                       another process of this training is gone
    │       └── MachineLostError                its machine is: go on with those left
    ├── SelectionError (ValueError)             candidates that cannot be averaged or compared
    └── ExportError
        ├── CheckDiedError                      the process of a check was killed
        ├── ParityError                         an artifact is not the champion
        └── BundleError                         a bundle that is not what its manifest says

The exit code of a process is the ``exit_code`` of the error that ended it.
"""

from __future__ import annotations

from typing import ClassVar


def kind_of(value: object, *, is_full: bool = False) -> str:
    """What a value is: ``an int``, ``a Linear``; with its module where ``is_full`` asks for it."""
    if value is None:
        return "None"
    kind = type(value)
    is_named = is_full and kind.__module__ != "builtins"
    name = f"{kind.__module__}.{kind.__qualname__}" if is_named else kind.__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"  # a UNet, a UserDict


class HoldfastError(Exception):
    """Base of all errors that are raised on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(HoldfastError, ValueError):
    """The input is wrong; running again without changing it is pointless."""

    exit_code: ClassVar[int] = 2


class ConfigError(InputError):
    """A key or a value of the configuration is not allowed."""


class ExperimentError(InputError):
    """An experiment cannot be found, imported or built."""


class DataNotFoundError(InputError, FileNotFoundError):
    """A data folder or file is missing."""


class DataFormatError(InputError):
    """A data file does not have the documented format."""


class RunConflictError(InputError):
    """The run id belongs to a run with another configuration."""


class InexactError(InputError):
    """The result would not be exact, and strictness was asked for."""


class StorageError(HoldfastError, OSError):
    """Bytes could not be written, read, renamed or deleted."""


class StorageFullError(StorageError):
    """There is not enough space for what is about to be written.

    Attributes:
        needed_bytes: how much the write needs.
        free_bytes: how much is free.
    """

    def __init__(self, message: str, *, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class CheckpointError(HoldfastError):
    """A checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint."""


class CheckpointCorruptError(CheckpointError):
    """The bytes on disk are not the bytes that were committed."""


class CheckpointMismatchError(CheckpointError):
    """The checkpoint was made by another configuration or another model."""

    exit_code: ClassVar[int] = 2


class UnsupportedStateError(CheckpointError, TypeError):
    """State that is neither a tensor nor JSON; the message names the path of the key."""

    exit_code: ClassVar[int] = 2


class LeaseError(HoldfastError):
    """Who may write a run is in question."""


class LeaseHeldError(LeaseError):
    """Another segment holds the run's lease, and it has not expired."""


class LeaseLostError(LeaseError):
    """This segment's lease was taken over; it must stop without changing anything."""


class TrainingError(HoldfastError):
    """Training cannot go on."""


class LoaderError(TrainingError):
    """A sample could not be fetched, or a loader process died."""


class NonFiniteLossError(TrainingError, ArithmeticError):
    """The loss is NaN or infinite.

    Attributes:
        step: the step that was being computed.
        batch: the number of the batch within its epoch.
    """

    def __init__(self, message: str, *, step: int, batch: int) -> None:
        super().__init__(message)
        self.step = step
        self.batch = batch


class LossJumpError(TrainingError, ArithmeticError):
    """A loss jumps, where spikes are watched; or there was one spike more than is allowed.

    Attributes:
        step: the step whose loss it is.
        loss: its value; NaN where the number of spikes is the reason.
    """

    def __init__(self, message: str, *, step: int, loss: float) -> None:
        super().__init__(message)
        self.step = step
        self.loss = loss


class NonFiniteStateError(TrainingError, ArithmeticError):
    """Parameters, the optimizer's state or moving averages hold a NaN or an infinity.

    Attributes:
        step: after which it was found.
        tensor: the first of them.
    """

    def __init__(self, message: str, *, step: int, tensor: str) -> None:
        super().__init__(message)
        self.step = step
        self.tensor = tensor


class OutOfMemoryError(TrainingError, MemoryError):
    """A step or an evaluation does not fit into memory; the same would happen again."""


class RankLostError(TrainingError):
    """Another process of this training has ended or hangs, and this one cannot go on."""


class MachineLostError(RankLostError):
    """Another machine of this training is gone; a new start goes on with those that are left."""


class SelectionError(HoldfastError, ValueError):
    """Candidates that cannot be averaged or compared with each other."""


class ExportError(HoldfastError):
    """The champion cannot be exported."""


class CheckDiedError(ExportError):
    """The process of a check was killed before it said anything; another try may be luckier."""


class ParityError(ExportError):
    """An exported artifact does not compute what the champion computes."""


class BundleError(ExportError):
    """A bundle is not what its manifest says."""
