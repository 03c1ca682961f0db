"""The comparison of trainers: one variant of each that Holdfast keeps, and it is exact."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.training.exactness.reproducibility import child_environment

PROGRAM = Path(__file__).resolve().parents[3] / "benchmarks" / "peers" / "compare.py"
OURS = ("loop_holdfast", "transformers_holdfast", "lightning_holdfast")


@pytest.mark.slow
def test_one_variant_of_each_that_holdfast_keeps_is_exact(tmp_path: Path) -> None:
    asked = [word for name in OURS for word in ("--rival", name)]
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAM), "--seeds=1", "--variants=1", *asked, "--at-once=1"],
        env={**child_environment(1), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "**" in line]
    assert [row.count("**1 of 1**") for row in rows] == [1, 1, 1], done.stdout
