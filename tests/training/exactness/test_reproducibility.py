"""What a process that trains is started with."""

from __future__ import annotations

import os

import pytest

from holdfast.training.exactness.reproducibility import default_num_threads


@pytest.mark.parametrize(("wanted", "num"), [("3", 3), ("4,2", 4), (" 2 ", 2)])
def test_the_variable_that_torch_reads_sets_the_number_of_threads(wanted: str, num: int) -> None:
    assert default_num_threads({"OMP_NUM_THREADS": wanted}) == num


@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "0"}, {"OMP_NUM_THREADS": "x"}])
def test_without_it_all_cores_of_this_process_are_used(environment: dict[str, str]) -> None:
    assert default_num_threads(environment) == len(os.sched_getaffinity(0))
