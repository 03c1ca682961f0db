"""The tokens of a text: encoded once, kept on this machine's scratch disk, and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.training.bundles.continuing import TextError, Vocabulary
from holdfast.training.configuration.schema import Split
from holdfast.training.errors import DataFormatError, StorageError
from holdfast.training.tiers.scratch import SCRATCH_VARIABLE, scratch_folder

FOLDER = "tokens"
VERSION = 1
CHUNK_CHARS = 1 << 20


@dataclass(frozen=True)
class TokenFile:
    """Some tokens of a file; travels to loader processes as its name."""

    path: Path
    first: int
    num_tokens: int
    digest: str

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """The tokens, unsigned integers, read from disk as they are needed."""
        whole = np.load(self.path, mmap_mode="r", allow_pickle=False)
        tokens: npt.NDArray[Any] = whole[self.first : self.first + self.num_tokens]
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("path", "first", "num_tokens", "digest")}


def stored_tokens(texts: Mapping[Split, str], vocabulary: Vocabulary) -> dict[Split, TokenFile]:
    """The tokens of each split, encoded now or before; a file that was changed is made anew.

    Raises DataFormatError for a text that the vocabulary has no symbols for, StorageError where
    the file cannot be written.
    """
    hasher = hashlib.sha256(f"{VERSION}\n".encode() + vocabulary.serialized)
    for split, text in texts.items():
        hasher.update(f"\n{split} {len(text)}\n".encode() + text.encode())
    path = scratch_folder() / FOLDER / f"{hasher.hexdigest()[:32]}.npy"
    found = _read(path, texts)
    if found is None:
        _write(path, texts, vocabulary)
        found = _read(path, texts)
    if found is None:
        raise StorageError(f"{path} was changed while it was read; start again")
    return found


def _read(path: Path, texts: Mapping[Split, str]) -> dict[Split, TokenFile] | None:
    """The splits of a file; None where it is not there, or not as it was written."""
    with suppress(OSError, EOFError, ValueError, KeyError, TypeError):
        told = json.loads(path.with_suffix(".json").read_bytes())
        found, first = {}, 0
        for split in texts:
            num, digest = told[split]["num_tokens"], told[split]["digest"]
            part = TokenFile(path, first, num, digest)
            if _digest(part.tokens) != digest:
                return None
            found[split] = part
            first += num
        return found
    return None


def _write(path: Path, texts: Mapping[Split, str], vocabulary: Vocabulary) -> None:
    dtype = np.uint16 if vocabulary.size <= 1 << 16 else np.uint32
    parts = {split: _encoded(text, vocabulary, dtype) for split, text in texts.items()}
    told = {
        split: {"digest": _digest(part), "num_tokens": len(part)} for split, part in parts.items()
    }
    # Two processes may do this at once: each renames a file of its own, and both are the same.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as stream:
            np.save(stream, np.concatenate(list(parts.values())), allow_pickle=False)
        scratch.rename(path)
        scratch.write_text(json.dumps(told, sort_keys=True))
        scratch.rename(path.with_suffix(".json"))
    except OSError as error:
        raise StorageError(
            f"cannot keep the tokens of the text in {path.parent}: {error.strerror}; name another "
            f"folder in {SCRATCH_VARIABLE}"
        ) from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def _encoded(text: str, vocabulary: Vocabulary, dtype: type[Any]) -> npt.NDArray[Any]:
    try:
        return np.array(vocabulary.encode(text), dtype=dtype)
    except TextError as error:
        raise DataFormatError(
            f"the text has a character that its vocabulary lacks: {error}; take a vocabulary of "
            f"bytes (experiment.vocabulary = 'bpe')"
        ) from error


def _digest(tokens: npt.NDArray[Any]) -> str:
    """Of the numbers, whatever their type on disk."""
    hasher = hashlib.blake2b(str(tokens.dtype).encode(), digest_size=16)
    for first in range(0, len(tokens), CHUNK_CHARS):
        hasher.update(np.ascontiguousarray(tokens[first : first + CHUNK_CHARS]).tobytes())
    return hasher.hexdigest()
