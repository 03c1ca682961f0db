"""Random numbers: seeds derived from a root, and the state of every global generator.

Three sources are global to a process, and user code draws from all of them: ``random``, NumPy's
``np.random`` functions, and torch with its devices. A checkpoint holds all their states as
tensors; evaluation puts them back; and a fetch of data runs with its own, so that what an item
draws depends on its place in the run and on nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from holdfast.training.errors import CheckpointMismatchError, UnsupportedStateError
from holdfast.training.exactness.strictness import warn_of_inexactness

Argument = TypeVar("Argument")
Result = TypeVar("Result")

MT_WORDS = 624
GENERATOR_SHAPES = {
    "random.words": (torch.int64, MT_WORDS + 2),
    "random.gauss": (torch.float64, 2),
    "numpy.words": (torch.int64, MT_WORDS + 2),
    "numpy.gauss": (torch.float64, 1),
    "torch.cpu": (torch.uint8, 5056),
}
_CUDA_PREFIX = "torch.cuda."
_MARK_BYTES = 20


def derive_seed(root: int, *path: str | int) -> int:
    """A seed in [0, 2**63) for one purpose, independent of the seeds of all other paths.

    ``derive_seed(seed, "order", epoch)`` and the like: the same arguments give the same seed on
    every machine, and 1 and "1" are different parts of a path.
    """
    text = "/".join(
        [str(root), *(f"{part:d}" if type(part) is int else repr(part) for part in path)]
    )
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"holdfast").digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int) -> None:
    """Seed ``random``, NumPy's global generator and torch on every device from one number."""
    random.seed(derive_seed(seed, "random"))
    numpy_seed = derive_seed(seed, "numpy")
    np.random.seed([numpy_seed & 0xFFFFFFFF, numpy_seed >> 32])
    torch.manual_seed(derive_seed(seed, "torch"))


def seed_scoring(batch: int) -> None:
    """Seed all generators for the scoring of a batch, the same in each evaluation of it."""
    seed_generators(derive_seed(0, "score", batch))


def capture_generators() -> dict[str, Tensor]:
    """The state of all global generators as tensors; equal states give equal bytes.

    CUDA devices are included once CUDA was used in this process. Raises UnsupportedStateError
    where NumPy's global generator was replaced by one other than MT19937.
    """
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    if not isinstance(state, dict) or state["bit_generator"] != "MT19937":
        raise UnsupportedStateError(
            f"NumPy's global generator is {np.random.get_bit_generator()!r}, which cannot be "  # type: ignore[attr-defined]
            "saved; expected MT19937. Draw from a numpy.random.Generator of your own instead"
        )
    numpy_words = [*state["state"]["key"].tolist(), state["state"]["pos"], state["has_gauss"]]
    captured = {
        "random.words": torch.tensor([version, *words], dtype=torch.int64),
        "random.gauss": torch.tensor(
            [0.0, 0.0] if gauss is None else [1.0, gauss], dtype=torch.float64
        ),
        "numpy.words": torch.tensor(numpy_words, dtype=torch.int64),
        "numpy.gauss": torch.tensor([state["gauss"]], dtype=torch.float64),
        "torch.cpu": torch.default_generator.get_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            captured[f"{_CUDA_PREFIX}{device}"] = torch.cuda.get_rng_state(device)
    return captured


def restore_generators(captured: Mapping[str, Tensor]) -> None:
    """Put back what ``capture_generators`` returned.

    A CUDA device that this machine lacks is skipped with a warning. Raises
    CheckpointMismatchError, with nothing changed, where a state is missing.
    """
    needed = {"random.words", "random.gauss", "numpy.words", "numpy.gauss", "torch.cpu"}
    if missing := sorted(needed - set(captured)):
        raise CheckpointMismatchError(
            f"the saved generator states lack {', '.join(missing)}; found {sorted(captured)}"
        )
    version, *words = captured["random.words"].tolist()
    has_gauss, gauss = captured["random.gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_gauss else None))
    *key, position, has_numpy_gauss = captured["numpy.words"].tolist()
    numpy_gauss = captured["numpy.gauss"].item()
    np.random.set_state(
        ("MT19937", np.array(key, dtype=np.uint32), position, has_numpy_gauss, numpy_gauss)
    )
    torch.default_generator.set_state(captured["torch.cpu"].cpu())
    for name in sorted(name for name in captured if name.startswith(_CUDA_PREFIX)):
        _restore_cuda(int(name.removeprefix(_CUDA_PREFIX)), captured[name])


def generator_problem(captured: Mapping[str, Tensor]) -> str | None:
    """What keeps states from being put back, or from being drawn from; None where nothing does.

    NumPy takes a position that lies outside of its state, and ends the process at the next draw;
    a state of zeros alone keeps it from ever finding a normal number.
    """
    for name, (dtype, size) in GENERATOR_SHAPES.items():
        found = captured.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != (size,):
            return f"{name} is not {size} numbers of type {dtype}"
    for name, state in captured.items():
        device = name.removeprefix(_CUDA_PREFIX)
        is_state = state.dtype == torch.uint8 and state.dim() == 1 and device.isdecimal()
        if name.startswith(_CUDA_PREFIX) and not is_state:
            return f"{name} is no state of a generator"
    return _words_problem(captured)


def _words_problem(captured: Mapping[str, Tensor]) -> str | None:
    version, *python_words, python_position = captured["random.words"].tolist()
    *numpy_words, numpy_position, has_gauss = captured["numpy.words"].tolist()
    if version != random.getstate()[0] or has_gauss not in (0, 1):
        return f"random has the version {version}, numpy has_gauss {has_gauss}"
    states = {
        "random": (python_words, python_position),
        "numpy": (numpy_words, numpy_position),
        "torch.cpu": _torch_words(captured["torch.cpu"]),
    }
    for name, (words, position) in states.items():
        if not 0 <= position <= MT_WORDS or not all(0 <= word < 2**32 for word in words):
            return f"the state of {name} is at position {position}, expected 0 to {MT_WORDS}"
        if not (words[0] & 0x8000_0000 or any(words[1:])):
            return f"the state of {name} is zero, from which nothing can be drawn"
    return None


def _torch_words(state: Tensor) -> tuple[list[int], int]:
    """Words and position of torch's MT19937; -1 where the two places that tell it disagree."""
    # ATen, CPUGeneratorImplStateLegacy: seed u64, left i32, seeded i32, next u64, words u64[624].
    _, left, seeded, following, *words = struct.unpack_from(
        f"<QiiQ{MT_WORDS}Q", bytes(state.numpy())
    )
    is_fresh = (left, following) == (1, 0)
    is_whole = seeded == 1 and 1 <= left <= MT_WORDS and left + following == MT_WORDS + 1
    return words, following if is_fresh or is_whole else -1


def _restore_cuda(device: int, state: Tensor) -> None:
    if torch.cuda.is_available() and device < torch.cuda.device_count():
        torch.cuda.set_rng_state(state.cpu(), device)
        return
    warn_of_inexactness(
        f"the checkpoint holds the generator of CUDA device {device}, which this machine lacks; "
        "what is drawn on devices will differ from the uninterrupted run"
    )


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put all global generators back at the end, however the block ends."""
    captured = capture_generators()
    try:
        yield
    finally:
        restore_generators(captured)


def seed_fetch(seed: int) -> None:
    """Seed the three CPU generators for one fetch; for a process that does nothing else."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def seed_shard(root: int, *path: str | int) -> None:
    """Seed all generators for one shard of a step, or for what follows a step.

    Cheaper than ``seed_generators``, for it is paid for every shard.
    """
    seed = derive_seed(root, *path)
    seed_fetch(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


class IsolatedGenerators:
    """Runs a function with freshly seeded generators and leaves the surrounding ones untouched.

    It costs about 20 µs, because it is paid for every microbatch: NumPy's bit generator is
    swapped rather than copied out and in (45 µs). A swap forgets the second half of a pair of
    normal numbers that NumPy's global generator may hold back, so the swap is undone by a full
    copy in the one case where there can be such a number: something was drawn since last time.
    Python's own is kept as its words in memory, and not as 625 numbers (25 µs).
    """

    def __init__(self) -> None:
        self._python = _PythonState()
        self._inner = np.random.MT19937(0)
        self._outer: Any = None
        self._words: memoryview | None = None
        self._mark_after = b""

    def run(self, seed: int, function: Callable[[Argument], Result], argument: Argument) -> Result:
        """``function(argument)`` with ``random``, NumPy and torch (CPU) seeded from ``seed``."""
        python_state = self._python.kept()
        torch_state = torch.default_generator.get_state()
        held_back = self._swap_numpy()
        try:
            seed_fetch(seed)
            return function(argument)
        finally:
            self._python.put_back(python_state)
            torch.default_generator.set_state(torch_state)
            self._swap_numpy_back(held_back)

    def _swap_numpy(self) -> Any:
        """Swap in the inner bit generator; the full state where a number may be held back."""
        outer = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if outer is not self._outer:
            self._outer, self._mark_after = outer, b""
            self._words = _state_words(outer)
        held_back = None
        if not self._mark_after or self._mark() != self._mark_after:
            state = np.random.get_state(legacy=False)
            held_back = state if isinstance(state, dict) and state["has_gauss"] else None
        np.random.set_bit_generator(self._inner)  # type: ignore[attr-defined]
        return held_back

    def _swap_numpy_back(self, held_back: Any) -> None:
        np.random.set_bit_generator(self._outer)  # type: ignore[attr-defined]
        if held_back is not None:
            np.random.set_state(held_back)
            self._mark_after = b""
        else:
            self._mark_after = self._mark()

    def _mark(self) -> bytes:
        """NumPy's position, which lies behind its words, and the last of these; or nothing."""
        return b"" if self._words is None else bytes(self._words[-_MARK_BYTES:])


class _PythonState:
    """The state of ``random``, kept and put back as it lies in memory where its place is known.

    CPython has position and words right behind an object's head. That they are there is seen once;
    elsewhere ``getstate`` and ``setstate`` do the same. Whoever draws moves the position, or all
    words with it: where it and the first words are those of last time, so is the rest.
    """

    def __init__(self) -> None:
        owner: Any = random.random.__self__  # type: ignore[attr-defined]
        self._owner = owner
        self._words = _words_of(owner) if type(owner) is random.Random else None
        self._kept = b""

    def kept(self) -> Any:
        """What ``put_back`` takes."""
        if self._words is None:
            return random.getstate()
        if not self._kept or self._words[:_MARK_BYTES] != self._kept[:_MARK_BYTES]:
            self._kept = bytes(self._words)
        return self._kept, self._owner.gauss_next

    def put_back(self, state: Any) -> None:
        """Have ``random`` draw what it would have drawn when this was kept."""
        if self._words is None:
            random.setstate(state)
        else:
            self._words[:], self._owner.gauss_next = state


def _words_of(owner: random.Random) -> memoryview | None:
    """The memory of a generator's position and words; None where they are elsewhere."""
    size = MT_WORDS + 1
    if sys.implementation.name != "cpython" or owner.__sizeof__() < object.__basicsize__ + 4 * size:
        return None
    words = _memory(id(owner) + object.__basicsize__, size)
    *state, position = owner.getstate()[1]
    return words if words.cast("I").tolist() == [position, *state] else None


def _state_words(bit_generator: Any) -> memoryview | None:
    """The memory of an MT19937's 624 words and position; None where that is not its layout."""
    if type(bit_generator) is not np.random.MT19937:
        return None
    words = _memory(bit_generator.ctypes.state_address, MT_WORDS + 1)
    state = bit_generator.state["state"]
    return words if words.cast("I").tolist() == [*state["key"].tolist(), state["pos"]] else None


def _memory(address: int, num_words: int) -> memoryview:
    return memoryview((ctypes.c_uint32 * num_words).from_address(address)).cast("B")
