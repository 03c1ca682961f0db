"""Continue a text with the language model of a bundle, with ONNX Runtime and NumPy alone.

This file stands alone: Holdfast imports it, and the bundle of a language model carries a copy as
``continue_text.py``.

    python continue_text.py PROMPT [--tokens N]    in the bundle's folder; PROMPT is a UTF-8 file

Each token is the most probable one after those before it. Where the model's context is full, the
last half of it begins a new one. Exit codes: 0 good, 1 refused, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

VOCABULARY = "vocabulary.json"
VERSION = 1
NUM_BYTES = 256
KINDS = ("characters", "bpe")
WORDS = re.compile(r" ?\w+| ?[^\w\s]+|\s+")
"""What merges of a learnt vocabulary stay within; every character is in one of these."""
PREFILL, STEP = "prefill", "decode_step"
NUM_TOKENS = 200
MAX_PROMPT_BYTES = 1 << 24
PLACEHOLDER = "\N{REPLACEMENT CHARACTER}"

Runner = Callable[[Mapping[str, Any]], Sequence[Any]]


class TextError(ValueError):
    """A text that the model cannot continue."""


class Vocabulary:
    """Text to numbers of symbols and back.

    The symbols are the characters of a text; or all bytes and, one after the other, what two
    earlier symbols make together, so that no text has an unknown one.
    """

    def __init__(self, kind: str, symbols: str = "", merges: Sequence[tuple[int, int]] = ()):
        self.kind, self.symbols, self.merges = kind, symbols, tuple(merges)
        self._numbers = {symbol: number for number, symbol in enumerate(symbols)}
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._words: dict[str, list[int]] = {}
        if kind == "characters":
            self.bytes_of = [symbol.encode() for symbol in symbols]
        else:
            self.bytes_of = [bytes([number]) for number in range(NUM_BYTES)]
            for one, other in self.merges:
                self.bytes_of.append(self.bytes_of[one] + self.bytes_of[other])

    @classmethod
    def parse(cls, content: bytes) -> Vocabulary:
        """From the bytes of ``vocabulary.json``. Raises ValueError where they are none."""
        found = json.loads(content)
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise ValueError(f"it is no vocabulary of version {VERSION}")
        kind, symbols, merges = found.get("kind"), found.get("symbols", ""), found.get("merges", [])
        if kind not in KINDS or not isinstance(symbols, str) or not isinstance(merges, list):
            raise ValueError(f"it is no vocabulary of {' or '.join(KINDS)}")
        for rank, pair in enumerate(merges):
            is_pair = isinstance(pair, list) and len(pair) == 2
            if not is_pair or not all(type(n) is int and 0 <= n < NUM_BYTES + rank for n in pair):
                raise ValueError(f"merge {rank} is no pair of earlier symbols")
        if kind == "characters" and (not symbols or len(set(symbols)) != len(symbols)):
            raise ValueError("its characters are none, or not all different")
        return cls(kind, symbols, [(one, other) for one, other in merges])

    @property
    def serialized(self) -> bytes:
        """The bytes of ``vocabulary.json``; the same for the same symbols."""
        own = {"symbols": self.symbols} if self.kind == "characters" else {"merges": self.merges}
        told = {"kind": self.kind, "version": VERSION, **own}
        return json.dumps(told, ensure_ascii=True, separators=(",", ":")).encode()

    @property
    def size(self) -> int:
        """Number of symbols."""
        return len(self.bytes_of)

    def encode(self, text: str) -> list[int]:
        """Numbers of the symbols of a text. Raises TextError for a character that is none."""
        if self.kind == "bpe":
            return [number for word in WORDS.findall(text) for number in self._merged(word)]
        try:
            return [self._numbers[character] for character in text]
        except KeyError as error:
            place = text.index(error.args[0])
            line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
            raise TextError(
                f"line {line}, column {column}: the model does not know the character "
                f"{error.args[0]!r}; it knows {self.symbols!r}"
            ) from None

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of some symbols; bytes that are no UTF-8 are shown as U+FFFD."""
        return b"".join(self.bytes_of[number] for number in numbers).decode(errors="replace")

    def _merged(self, word: str) -> list[int]:
        """The symbols of a word: the earliest merge first, everywhere in it."""
        found = self._words.get(word)
        if found is None:
            found = list(word.encode())
            while len(found) > 1:
                pairs = pairwise(found)
                rank = min(self._ranks.get(pair, len(self._ranks)) for pair in pairs)
                if rank == len(self._ranks):
                    break
                found = joined(found, self.merges[rank], NUM_BYTES + rank)
            self._words[word] = found
        return found


def joined(numbers: Sequence[int], pair: tuple[int, int], number: int) -> list[int]:
    """The numbers with one in the place of each pair, from left to right."""
    found: list[int] = []
    place = 0
    while place < len(numbers):
        is_pair = tuple(numbers[place : place + 2]) == pair
        found.append(number if is_pair else numbers[place])
        place += 2 if is_pair else 1
    return found


def continued(prefill: Runner, step: Runner, context: int, prompt: Sequence[int]) -> Iterator[int]:
    """The tokens after a prompt, without an end, each the most probable one.

    ``prompt`` has 1 to ``context`` tokens. The runners take arrays by name, and return those of
    the parts of the same name.
    """
    import numpy as np

    known = list(prompt)
    while True:
        tokens = np.zeros((1, context), np.int64)
        tokens[0, : len(known)] = known
        logits, cache = prefill({"tokens": tokens, "length": np.array([len(known)])})
        while True:
            token = int(np.argmax(logits[0]))
            yield token
            known.append(token)
            if len(known) > context:
                break
            place = np.array([len(known) - 1])
            logits, cache = step({"token": np.array([token]), "position": place, "cache": cache})
        known = known[-max(1, context // 2) :]


def continue_text(folder: Path, text: str, num_tokens: int = NUM_TOKENS) -> str:
    """What the model of a bundle adds to a text. The files are not verified here.

    Raises TextError for a text that is empty, longer than the context, or has an unknown character;
    ValueError or OSError where the folder holds no language model.
    """
    manifest = json.loads((folder / "manifest.json").read_bytes())
    parts = manifest.get("parts", {})
    if not {PREFILL, STEP} <= parts.keys() or not (folder / VOCABULARY).is_file():
        raise ValueError(f"{folder} holds no language model: parts and {VOCABULARY} are not there")
    vocabulary = Vocabulary.parse((folder / VOCABULARY).read_bytes())
    ports = {port["name"]: port["shape"] for port in parts[PREFILL]["interface"]["inputs"]}
    context = int(ports["tokens"][0])
    prompt = vocabulary.encode(text)
    if not 1 <= len(prompt) <= context:
        raise TextError(
            f"the text has {len(prompt)} tokens, and the model's context holds 1 to {context}: "
            f"give it {'a beginning' if not prompt else 'the end of the text alone'}"
        )
    runners = [_runner(folder / f"parts/{name}/1/model.onnx") for name in (PREFILL, STEP)]
    added = continued(runners[0], runners[1], context, prompt)
    return vocabulary.decode([next(added) for _ in range(num_tokens)])


def _runner(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(arrays: Mapping[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = session.run(None, dict(arrays))
        return outputs

    return run


def read_prompt(path: Path) -> str:
    """The text of a UTF-8 file, without the line end that closes it. Raises TextError."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise TextError(f"{path} has more than {MAX_PROMPT_BYTES:,} bytes")
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is no UTF-8: byte {error.start} is no character") from error
    return text[:-1] if text.endswith("\n") and len(text) > 1 else text


def main(arguments: list[str] | None = None) -> int:
    """Print a prompt and what comes after it; the exit code."""
    parser = argparse.ArgumentParser(description="Continue a text with a bundle's language model.")
    parser.add_argument("prompt", type=Path)
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, metavar="N")
    options = parser.parse_args(arguments)
    try:
        text = read_prompt(options.prompt)
        added = continue_text(options.bundle, text, options.tokens)
    except ModuleNotFoundError as error:
        print(f"error: this needs {error.name}: pip install onnxruntime numpy", file=sys.stderr)
        return 1
    except TextError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001 - of what a stranger wrote, or of a runtime
        print(f"error: the bundle cannot be used: {error}".splitlines()[0], file=sys.stderr)
        return 1
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    print(text + added)
    return 0


if __name__ == "__main__":
    sys.exit(main())
