"""A subword vocabulary: byte-level BPE, learnt from training text by the ``tokenizers`` library.

Byte level means that no text has an unknown symbol. Learning counts, and breaks ties by number, so
the same text gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from holdfast.training.errors import ConfigError

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<s>", "</s>"]
NUM_BYTES = 256
THREADS_VARIABLE = "TOKENIZERS_PARALLELISM"


class Vocabulary:
    """Text to numbers of subwords and back; the same for both languages.

    ``serialized`` is the library's own JSON, which any of its language bindings reads.
    """

    def __init__(self, serialized: bytes) -> None:
        self.serialized = serialized
        self._tokenizer = Tokenizer.from_str(serialized.decode())
        # A text may hold "</s>": then these are four characters, not the end.
        self._tokenizer.encode_special_tokens = True

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> Vocabulary:
        """At most ``size`` symbols. Raises ConfigError where these cannot hold all bytes."""
        smallest = NUM_BYTES + len(SPECIAL)
        if size < smallest:
            raise ConfigError(
                f"experiment.vocabulary_size = {size} is too small: the 256 bytes and "
                f"{len(SPECIAL)} special symbols need {smallest}"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        with _single_thread():
            tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str().encode())

    @property
    def size(self) -> int:
        """Number of symbols, the special ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Numbers of the subwords of each text, without BOS and EOS."""
        with _single_thread():
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row up to its first EOS; PAD and BOS are left out."""
        with _single_thread():
            texts = self._tokenizer.decode_batch([_until_end(row) for row in rows])
        return [text.strip() for text in texts]


def _until_end(row: Sequence[int]) -> list[int]:
    ids = list(row)
    return ids[: ids.index(EOS)] if EOS in ids else ids


@contextmanager
def _single_thread() -> Iterator[None]:
    """The library reads this variable at each call; its threads would also outlive the call."""
    before = os.environ.get(THREADS_VARIABLE)
    os.environ[THREADS_VARIABLE] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS_VARIABLE]
        else:
            os.environ[THREADS_VARIABLE] = before
