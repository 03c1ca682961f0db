"""Read a text, and split it: the end of it validates and tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.training.configuration.schema import Split
from holdfast.training.errors import DataFormatError, DataNotFoundError
from holdfast.training.storage.address import address_in
from holdfast.training.streams.formats import KINDS, Sample
from holdfast.training.streams.stream_files import StreamFiles

SUFFIX = ".txt"


def read_text(folder: Path, names: Sequence[str], field: str) -> str:
    """The text of some files of a folder, one after the other.

    Without names all its ``.txt`` files; where it has none, or is an address, its stream files. Of
    each of their samples the text is in a field, and ends with a line end.

    Raises:
        DataNotFoundError: a file, or the folder, is not there.
        DataFormatError: it is not UTF-8, a sample has no such field, or there is no text at all.
    """
    if address_in(folder) is not None:
        places: list[Path] = [folder / name for name in names] or [folder]
        return "".join(_of_streams(place, field) for place in places)
    paths = [folder / name for name in names] or sorted(folder.glob(f"*{SUFFIX}"))
    if not paths and not any(path.suffix.lower() in KINDS for path in folder.rglob("*")):
        found = "has no such file" if folder.is_dir() else "does not exist"
        raise DataNotFoundError(
            f"language_model reads the {SUFFIX} files, or the stream files, of data.folder = "
            f"{str(folder)!r}, which {found}; name others with experiment.text_files. Without "
            f"data.folder it trains on a small generated text"
        )
    text = "".join(_read(path, field) for path in paths or [folder])
    if not text:
        raise DataFormatError(f"{(paths or [folder])[0]}: expected a text, found nothing")
    return text


def split_text(text: str, validation: float, test: float) -> dict[Split, str]:
    """The beginning trains; of the end, a part validates and the last part tests."""
    ends = [int(len(text) * (1 - validation - test)), int(len(text) * (1 - test))]
    return {
        "train": text[: ends[0]],
        "validation": text[ends[0] : ends[1]],
        "test": text[ends[1] :],
    }


def _of_streams(place: Path, field: str) -> str:
    files = StreamFiles(place)
    return "".join(_text_of(files[number], number, field, place) for number in range(len(files)))


def _text_of(sample: Sample, number: int, field: str, place: Path) -> str:
    found = sample.get(field)
    try:
        text = found.decode() if isinstance(found, bytes) else found
    except UnicodeDecodeError as error:
        raise DataFormatError(
            f"{place}: sample {number}, {field}: expected UTF-8, {error}"
        ) from None
    if not isinstance(text, str):
        raise DataFormatError(
            f"{place}: sample {number} has no text in its field {field!r}; it has "
            f"{', '.join(sample)}: name the field with experiment.text_field"
        )
    return f"{text}\n"


def _read(path: Path, field: str) -> str:
    if path.is_dir() or path.suffix.lower() in KINDS:
        return _of_streams(path, field)
    try:
        # As it stands: text mode would change the ends of lines.
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataNotFoundError(
            f"language_model needs {path}, which does not exist; name files below data.folder with "
            f"experiment.text_files"
        ) from None
    except OSError as error:
        raise DataNotFoundError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataFormatError(
            f"{path}, line {line}: expected UTF-8, found the byte 0x{error.object[error.start]:02x}"
        ) from error
