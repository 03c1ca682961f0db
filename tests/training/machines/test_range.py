"""How many machines train together, as it is configured."""

from __future__ import annotations

import pytest

from holdfast.training.configuration.loading import digested_values
from holdfast.training.configuration.schema import DistributedConfig, RunConfig

DDP = {"strategy": "ddp", "num_processes": 2}
FSDP = {"strategy": "fsdp", "num_processes": 2, "num_shards": 8}


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ({}, [1, 1, 1, 1]),
        ({**DDP, "num_shards": 8, "max_machines": 3}, [1, 2, 3, 3]),
        ({**DDP, "num_shards": 8, "min_machines": 2, "max_machines": 3}, [None, 2, 3, 3]),
        ({**DDP, "min_machines": 2, "max_machines": 2}, [None, 2, 2, 2]),
        ({**FSDP, "max_machines": 4}, [1, 2, 2, 4]),
        ({**FSDP, "min_machines": 3, "max_machines": 4}, [None, None, None, 4]),
    ],
)
def test_of_those_that_are_there_as_many_train_as_go_with_the_shards(
    values: dict[str, object], numbers: list[int | None]
) -> None:
    config = DistributedConfig.model_validate(values)
    assert [config.num_machines_of(number) for number in (1, 2, 3, 4)] == numbers


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"max_machines": 2}, "max_machines=2 needs a strategy"),
        ({**DDP, "max_machines": 2}, "min_machines=1 and max_machines=2 need num_shards"),
        ({**DDP, "min_machines": 2}, "min_machines=2 is more than max_machines=1"),
        (
            {**DDP, "num_shards": 4, "max_machines": 3},
            "num_processes=2 on each of max_machines=3 is more than num_shards=4",
        ),
        (
            {**FSDP, "min_machines": 3, "max_machines": 3},
            "num_processes=2 on 3 to 3 machines does not go with num_shards=8",
        ),
    ],
)
def test_a_range_that_cannot_be_is_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DistributedConfig.model_validate(values)


def test_the_number_of_machines_is_part_of_a_run_only_without_shards() -> None:
    def digested(**values: object) -> object:
        config = RunConfig.model_validate({"distributed": {"strategy": "ddp", **values}})
        return digested_values(config).get("distributed")

    assert digested(machines_wait_s=3.0, grow_after_s=None) == {"strategy": "ddp"}
    fixed = digested(min_machines=2, max_machines=2)
    assert fixed == {"strategy": "ddp", "max_machines": 2}
    assert digested(num_shards=4, max_machines=2) == {"num_shards": 4} == digested(num_shards=4)
