"""Training on streams: stream files, and data sets that can only be read from the front."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import IterableDataset

from holdfast import Context, StreamFiles
from tests.faults.campaign import Training, complete, differences, final_state
from tests.generality.harness import assert_exact
from tests.training.streams.stream_writers import write_folder

HERE = Path(__file__)
NUM_ITEMS = 50


def item(number: float) -> tuple[Tensor, Tensor]:
    """Noisy points of a line."""
    x = torch.tensor([number % 13 / 13])
    return x, 2 * x + 0.1 * torch.randn(1)


def decode(sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return item(int(sample["cls"]))


class Points:
    """Map-style, to validate on."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return item(index)


class FromFiles:
    """Stream files of ``data.folder``."""

    defaults: Mapping[str, Any] = {
        "train": {"num_epochs": 3},
        "data": {"batch_size": 8},
        "optimizer": {"args": {"lr": 0.01}},
    }

    def __init__(self, context: Context) -> None:
        self.folder = context.data_folder

    def dataset(self, split: str) -> Any:
        if split != "train":
            return Points()
        assert self.folder is not None
        return StreamFiles(self.folder, decode, window=32)

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": (model(batch[0]) - batch[1]).square().flatten()}

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


class Counting(IterableDataset[tuple[Tensor, Tensor]]):
    """Items in an order of their own, which is drawn anew in each pass."""

    def __init__(self) -> None:
        self.place = 0
        self.draws = torch.Generator().manual_seed(5)
        self.begun = self.draws.get_state()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.draws.set_state(self.begun)
        order = torch.randperm(NUM_ITEMS, generator=self.draws)
        while self.place < NUM_ITEMS:
            self.place += 1
            yield item(float(order[self.place - 1]))
        self.place, self.begun = 0, self.draws.get_state()

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "begun": self.begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.place, self.begun = state["place"], state["begun"]


class FromFront(FromFiles):
    """A stream that knows how far it is."""

    defaults: Mapping[str, Any] = {
        **FromFiles.defaults,
        "train": {"num_epochs": 3, "steps_per_epoch": 8},
    }

    def dataset(self, split: str) -> Any:
        return Counting() if split == "train" else Points()


class OfIterator(IterableDataset[tuple[Tensor, Tensor]]):
    """A stream whose iterator knows how far it is."""

    def __iter__(self) -> Any:
        return Walk()


class Walk:
    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> Walk:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.number == NUM_ITEMS:
            raise StopIteration
        self.number += 1
        return item(self.number)

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.number = state["number"]


class FromIterator(FromFront):
    def dataset(self, split: str) -> Any:
        return OfIterator() if split == "train" else Points()


class Packed(IterableDataset[tuple[Tensor, Tensor]]):
    """Texts of stream files in rows of equal length: into the room that is left in a row goes the
    longest of some buffered texts that fits (nanochat's "best fit"); where none does, the shortest
    is cut.
    """

    LENGTH, NUM_BUFFERED = 24, 5

    def __init__(self, folder: Path) -> None:
        self.files = StreamFiles(folder)
        self.number, self.buffer = 0, list[list[int]]()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while row := self.packed():
            numbers = torch.tensor(row) / 256
            yield numbers.mean()[None], numbers[:1]
        self.number = 0

    def packed(self) -> list[int]:
        """The next row; empty at the end of the texts, whose rest is left over."""
        row: list[int] = []
        while room := self.LENGTH - len(row):
            while len(self.buffer) < self.NUM_BUFFERED:
                if self.number == len(self.files):
                    return []
                self.buffer.append(list(str(self.files[self.number]["text"] * 3).encode()))
                self.number += 1
            fitting = [text for text in self.buffer if len(text) <= room]
            chosen = max(fitting, key=len) if fitting else min(self.buffer, key=len)
            self.buffer.remove(chosen)
            row += chosen[:room]
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "buffer": [list(text) for text in self.buffer]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number, self.buffer = state["number"], [list(text) for text in state["buffer"]]


class FromPacked(FromFront):
    """Texts that are packed from Parquet."""

    def dataset(self, split: str) -> Any:
        assert self.folder is not None
        return Packed(self.folder) if split == "train" else Points()


class Forgetful(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from (item(number) for number in range(NUM_ITEMS))


class FromForgetful(FromFront):
    def dataset(self, split: str) -> Any:
        return Forgetful() if split == "train" else Points()


class ValidatedOnAStream(FromFront):
    def dataset(self, split: str) -> Any:
        return Counting()


class WithoutLength(FromFront):
    defaults: Mapping[str, Any] = FromFiles.defaults


class FromHub(FromFront):
    """A data set of Hugging Face's library, on disk and streamed."""

    is_streamed = True

    def dataset(self, split: str) -> Any:
        from datasets import Dataset

        rows = Dataset.from_dict({"number": list(range(NUM_ITEMS))})
        if split != "train" or not self.is_streamed:
            return rows
        return rows.to_iterable_dataset(num_shards=2)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.score(model, batch)["loss"].mean()

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        x = batch["number"][:, None] / NUM_ITEMS
        return {"loss": (model(x) - 2 * x).square().flatten()}


class FromHubOnDisk(FromHub):
    is_streamed = False


def refused(name: str, folder: Path, *overrides: str) -> str:
    segment = Training(folder, name, f"{HERE}:{name}", overrides).start()
    assert segment.finish() == 2, "".join(segment.errors)
    return str(segment.events[-1]["error"]["message"])


def seeded_stops(seed: int) -> list[tuple[signal.Signals, int]]:
    """Four of the first 26 steps."""
    draws = random.Random(seed)
    steps = sorted(draws.sample(range(1, 26, 2), 4))
    return [(draws.choice([signal.SIGKILL, signal.SIGTERM]), step) for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "sizes"),
    [(0, (30, 7, 20, 11, 1)), (2, (30, 7, 20, 11, 1)), (4, (30, 7, 20, 11, 1)), (2, (69,))],
)
def test_stops_within_stream_files_change_no_byte(
    tmp_path: Path, num_workers: int, sizes: tuple[int, ...]
) -> None:
    """In the last case all samples, and so all resumes, are within one file."""
    write_folder(tmp_path / "data", ".tar", sizes)
    overrides = (f"data.folder={tmp_path / 'data'}", f"data.num_workers={num_workers}")
    stops = seeded_stops(num_workers + len(sizes))
    assert_exact(f"{HERE}:FromFiles", tmp_path, overrides, stops)


@pytest.mark.slow
def test_several_processes_read_stream_files_in_the_order_of_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", ".tar", (30, 7, 20, 11, 1))
    shards = ("distributed.strategy=ddp", "distributed.num_shards=4")
    overrides = (f"data.folder={tmp_path / 'data'}", *shards)
    states = []
    for num in (1, 2):
        own = (*overrides, f"distributed.num_processes={num}")
        training = Training(tmp_path / str(num), "one", f"{HERE}:FromFiles", own)
        complete(training)
        states.append(final_state(training.run))
    assert differences(*states) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FromFront", "FromIterator", "FromPacked"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_that_knows_its_place_goes_on_there(
    tmp_path: Path, name: str, num_workers: int
) -> None:
    suffix = ".jsonl" if find_spec("pyarrow") is None else ".parquet"
    write_folder(tmp_path / "data", suffix, (30, 20))
    overrides = (f"data.num_workers={num_workers}", "train.num_microbatches=2")
    assert_exact(f"{HERE}:{name}", tmp_path, (*overrides, f"data.folder={tmp_path / 'data'}"))


@pytest.mark.slow
def test_streams_that_cannot_be_gone_back_to_are_refused_with_what_to_do(tmp_path: Path) -> None:
    told = refused("FromForgetful", tmp_path)
    assert "Forgetful is a stream that does not know how far it is" in told
    assert "state_dict() and load_state_dict(state)" in told
    told = refused("WithoutLength", tmp_path)
    assert "Counting is a stream and has no length" in told
    assert "train.steps_per_epoch" in told
    told = refused("FromFront", tmp_path, "distributed.num_shards=2", "distributed.strategy=ddp")
    assert "distributed.strategy is set" in told
    told = refused("ValidatedOnAStream", tmp_path)
    assert "dataset('validation') must return a data set with __len__" in told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FromHub", "FromHubOnDisk"])
def test_data_sets_of_hugging_face_go_on_where_they_stopped(tmp_path: Path, name: str) -> None:
    pytest.importorskip("datasets", reason="Hugging Face's datasets are not installed")
    assert_exact(f"{HERE}:{name}", tmp_path)
