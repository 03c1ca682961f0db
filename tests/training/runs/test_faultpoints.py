from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.training.runs.faultpoints import TABLES, reach

SOURCES = Path(__file__).resolve().parents[3] / "training"


def exit_code(environment: dict[str, str]) -> int:
    code = (
        "from holdfast.training.runs.faultpoints import reach; "
        "[reach('commit.before-rename') for _ in range(3)]"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"HOLDFAST_FAULT_POINT": "commit.after-rename"}, 0),
        ({"HOLDFAST_FAULT_POINT": "commit.before-rename"}, -signal.SIGKILL),
        ({"HOLDFAST_FAULT_POINT": "commit.before-rename:3"}, -signal.SIGKILL),
        ({"HOLDFAST_FAULT_POINT": "commit.before-rename:4"}, 0),
        (
            {"HOLDFAST_FAULT_POINT": "commit.before-rename", "HOLDFAST_FAULT_SIGNAL": "SIGTERM"},
            -signal.SIGTERM,
        ),
    ],
)
def test_the_process_ends_at_the_point_that_was_asked_for(
    environment: dict[str, str], expected: int
) -> None:
    assert exit_code(environment) == expected


def test_the_table_names_exactly_the_points_that_the_code_reaches() -> None:
    reached: set[str] = set()
    for path in SOURCES.rglob("*.py"):
        reached |= set(re.findall(r'\breach\("([^"]+)"\)', path.read_text()))
    assert reached == {point for table in TABLES for point in table}


def test_a_point_that_nobody_asks_for_costs_next_to_nothing() -> None:
    start_s = time.perf_counter()
    for _ in range(1000):
        reach("commit.before-rename")
    assert time.perf_counter() - start_s < 0.1
