"""Records of a data set: without a trace on training, and the same however often interrupted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.training.errors import LeaseLostError
from holdfast.training.exactness.seeding import capture_generators, seed_generators
from holdfast.training.experiment.protocol import Batch, Context, Records, concatenate
from holdfast.training.loop.evaluation import evaluate
from holdfast.training.loop.record_file import RecordFile
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from tests.faults.hard_experiment import Hard, HardSettings


class Drawing(Hard):
    """Scores with draws from all generators, as careless user code does."""

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        random.random()
        np.random.rand()
        scored = super().score(model, batch)
        return {**scored, "drawn": torch.rand(len(scored["loss"]))}


def experiment() -> Drawing:
    return Drawing(Context(settings=HardSettings()))


def test_evaluation_leaves_no_trace_on_generators_modes_and_buffers() -> None:
    seed_generators(3)
    subject = experiment()
    model = subject.model()
    assert isinstance(model, nn.Sequential)
    model.train()
    model[1].eval()  # a frozen batch norm
    before = capture_generators()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert evaluate(subject, model, subject.dataset("validation"), batch_size=16) is not None
    after = capture_generators()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model][:3] == [True, False, True]


def test_records_do_not_depend_on_the_batch_size() -> None:
    seed_generators(3)
    subject = experiment()
    model = subject.model()
    dataset = subject.dataset("validation")
    small = evaluate(subject, model, dataset, batch_size=7)
    large = evaluate(subject, model, dataset, batch_size=64)
    assert small is not None
    assert large is not None
    assert np.array_equal(small["is_correct"], large["is_correct"])
    assert len(small["loss"]) == len(dataset)


def test_evaluation_stops_between_batches_when_a_notice_comes() -> None:
    subject = experiment()
    model = subject.model()
    answers = iter([False, False, True])
    records = evaluate(
        subject,
        model,
        subject.dataset("validation"),
        batch_size=8,
        should_stop=lambda: next(answers),
    )
    assert records is None


class InMemory:
    """Keeps what was offered."""

    def __init__(self) -> None:
        self.records: Records | None = None

    def load(self) -> Records | None:
        return self.records

    def offer(self, parts: Sequence[Records], is_last: bool) -> None:
        self.records = concatenate(list(parts)) if parts else None


def stop_after(num_batches: int) -> Iterator[bool]:
    yield from [False] * num_batches
    while True:
        yield True


def same(one: Records, other: Records) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) and one[name].dtype == other[name].dtype
        for name in one
    )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=4), st.integers(5, 70))
def test_records_are_the_same_however_often_they_were_interrupted(
    lives: list[int], batch_size: int
) -> None:
    seed_generators(3)
    subject, kept = experiment(), InMemory()
    model = subject.model()
    dataset = subject.dataset("validation")
    calm = evaluate(subject, model, dataset, batch_size=batch_size)
    for number, num_batches in enumerate(lives):
        seed_generators(number)  # each life is another process with generators of its own
        answers = stop_after(num_batches)
        evaluate(
            subject,
            model,
            dataset,
            batch_size=batch_size,
            should_stop=lambda answers=answers: next(answers),  # type: ignore[misc]
            kept=kept,
        )
    again = evaluate(subject, model, dataset, batch_size=batch_size, kept=kept)
    assert calm is not None
    assert again is not None
    assert same(calm, again)


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[Lease]:
    with Lease.acquire(RunDirectory(tmp_path / "run"), 20.0) as held:
        yield held


def records_of(num: int) -> Records:
    return {
        "loss": np.arange(num, dtype=np.float64),
        "is_correct": np.arange(num) % 2 == 0,
        "prediction": np.ones((num, 3), dtype=np.float32),
    }


def test_a_record_file_gives_back_what_was_offered_last(tmp_path: Path, lease: Lease) -> None:
    path = tmp_path / "records.safetensors"
    file = RecordFile(path, {"of": "a"}, lease, every_s=3600.0)
    assert file.load() is None
    file.offer([records_of(4)], is_last=False)
    assert not path.exists()
    file.offer([records_of(4), records_of(3)], is_last=True)
    again = RecordFile(path, {"of": "a"}, lease, every_s=3600.0)
    found = again.load()
    assert found is not None
    assert same(found, concatenate([records_of(4), records_of(3)]))
    before = path.stat().st_mtime_ns
    again.offer([found], is_last=True)
    assert path.stat().st_mtime_ns == before


def test_a_record_file_is_written_while_records_come(tmp_path: Path, lease: Lease) -> None:
    file = RecordFile(tmp_path / "records.safetensors", {}, lease, every_s=0.0)
    file.offer([records_of(4)], is_last=False)
    found = RecordFile(tmp_path / "records.safetensors", {}, lease, every_s=0.0).load()
    assert found is not None
    assert same(found, records_of(4))


def test_records_of_something_else_or_damaged_ones_count_as_none(
    tmp_path: Path, lease: Lease
) -> None:
    path = tmp_path / "records.safetensors"
    RecordFile(path, {"of": "a"}, lease, every_s=0.0).offer([records_of(4)], is_last=True)
    assert RecordFile(path, {"of": "b"}, lease, every_s=0.0).load() is None
    path.write_bytes(path.read_bytes()[:-1])
    assert RecordFile(path, {"of": "a"}, lease, every_s=0.0).load() is None
    path.write_bytes(b"")
    assert RecordFile(path, {"of": "a"}, lease, every_s=0.0).load() is None


def test_a_writer_that_lost_its_lease_changes_no_records(tmp_path: Path, lease: Lease) -> None:
    path = tmp_path / "records.safetensors"
    lease.release()
    with pytest.raises(LeaseLostError):
        RecordFile(path, {}, lease, every_s=0.0).offer([records_of(4)], is_last=True)
    assert not path.exists()


class ByDerivative(Hard):
    """Scores with the gradient of the model's output by its input."""

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        with torch.enable_grad():
            points = batch[0].clone().requires_grad_()
            [slope] = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        return {**super().score(model, batch), "slope": slope.norm(dim=1)}


def test_validation_may_take_derivatives() -> None:
    subject = ByDerivative(Context(settings=HardSettings()))
    records = evaluate(subject, subject.model(), subject.dataset("validation"), batch_size=16)
    assert records is not None
    assert (records["slope"] > 0).all()
