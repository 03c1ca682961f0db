from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from holdfast.training.errors import DataFormatError, ExperimentError
from holdfast.training.experiment.streamed import Streamed, taken
from tests.generality.test_streams import NUM_ITEMS, Counting, Forgetful, OfIterator, item


class Empty(Counting):
    def __iter__(self) -> Any:
        return iter(())


def batch(stream: Streamed, first: int, size: int = 7) -> list[float]:
    carried = stream.next_batch(np.arange(first, first + size))
    assert carried.state["position"] == first + size
    return [round(float(x), 6) for x in carried.batch[0].flatten()]


@pytest.mark.parametrize("kind", [Counting, OfIterator])
def test_a_stream_goes_on_from_the_state_that_came_with_a_batch(kind: type[Any]) -> None:
    calm = taken(kind())
    whole: list[list[float]] = []
    states: list[Any] = []
    for first in range(0, 3 * NUM_ITEMS, 7):
        carried = calm.next_batch(np.arange(first, first + 7))
        whole.append([round(float(x), 6) for x in carried.batch[0].flatten()])
        states.append(copy.deepcopy(carried.state))
    for number in (0, 5, 7, 14):
        again = taken(kind())
        again.go_to(7 * (number + 1), states[number])
        sent = pickle.loads(pickle.dumps(again))  # as to a loader process
        for later in (number + 1, number + 2):
            assert batch(sent, 7 * later) == whole[later]
    forward = taken(kind())
    forward.go_to(70, None)  # without a state, from the beginning
    assert batch(forward, 70) == whole[10]


class Told(Counting):
    """Another order in each pass, which is no part of its state."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        for number in range(self.place, NUM_ITEMS):
            self.place = number + 1
            yield item((number * (self.epoch + 3)) % NUM_ITEMS)
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Any) -> None:
        self.place = state["place"]


def test_a_stream_is_told_its_pass_again_where_it_goes_on() -> None:
    calm = taken(Told())
    whole = [calm.next_batch(np.arange(first, first + 10)) for first in range(0, 150, 10)]
    assert not torch.equal(whole[1].batch[0], whole[6].batch[0])
    for number in (3, 7, 11):
        again = taken(Told())
        again.go_to(10 * number + 10, whole[number].state)
        found = again.next_batch(np.arange(10 * number + 10, 10 * number + 20))
        assert torch.equal(found.batch[0], whole[number + 1].batch[0])


def test_by_index_it_has_its_first_items_and_reading_them_moves_nothing() -> None:
    stream = taken(Counting())
    first = batch(stream, 0)
    assert len(stream) == NUM_ITEMS
    assert stream[3][0].shape == (1,)
    again = taken(Counting())
    assert again[3] is again[3]
    assert batch(again, 0) == first


def test_a_stream_without_state_is_refused_and_other_data_are_left_alone() -> None:
    with pytest.raises(
        ExperimentError, match=r"Forgetful is a stream .* give it state_dict\(\) and"
    ):
        taken(Forgetful())
    items = [1, 2, 3]
    assert taken(items) is items
    assert issubclass(Counting, IterableDataset)


def test_a_state_of_another_place_and_a_stream_without_samples_are_refused() -> None:
    stream = taken(Counting())
    with pytest.raises(
        DataFormatError, match="the state of the stream is of sample 7, and training"
    ):
        stream.go_to(14, stream.next_batch(np.arange(7)).state)
    with pytest.raises(DataFormatError, match="Empty gave no sample"):
        taken(Empty()).next_batch(np.arange(2))
