"""What a process that trains is started with."""

from __future__ import annotations

import os

import pytest
import torch

from holdfast.training.exactness.reproducibility import (
    FILLED_MEMORY,
    default_num_threads,
    set_up_torch,
)


@pytest.mark.parametrize(("wanted", "num"), [("3", 3), ("4,2", 4), (" 2 ", 2)])
def test_the_variable_that_torch_reads_sets_the_number_of_threads(wanted: str, num: int) -> None:
    assert default_num_threads({"OMP_NUM_THREADS": wanted}) == num


@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "0"}, {"OMP_NUM_THREADS": "x"}])
def test_without_it_all_cores_of_this_process_are_used(environment: dict[str, str]) -> None:
    assert default_num_threads(environment) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("is_filled", [True, False])
def test_fresh_memory_is_filled_only_where_faults_are_looked_for(
    is_filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in FILLED_MEMORY.items():
        monkeypatch.delenv(name, raising=False)
        if is_filled:
            monkeypatch.setenv(name, value)
    before = torch.get_deterministic_debug_mode()
    try:
        set_up_torch("deterministic", torch.get_num_threads())
        assert torch.utils.deterministic.fill_uninitialized_memory == is_filled
        if is_filled:
            assert torch.empty(1000).isnan().all()
    finally:
        torch.set_deterministic_debug_mode(before)
