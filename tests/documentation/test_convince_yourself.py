"""The commands of docs/convince_yourself.md do what the page says, and print what it shows."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.documentation.printed import (
    blocks,
    run_script,
    save_programs,
    unnamed_commands,
    what_differs,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "convince_yourself.md"
TRAJECTORY = ("calm", "stopped", "losses", "compared", "contrast")
AVERAGES = ("calm", "candidates", "choice", "decays", "decays measured")
SILENT = ("calm", "candidates")
END_OF_BLOCK = "~~~ end of block\n"


def told_by(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """What each block prints, all of them run one after another in one shell."""
    save_programs(PAGE, folder)
    printed = blocks(PAGE)
    script = "".join(f"{printed[name]}\necho '{END_OF_BLOCK.strip()}'\n" for name in names)
    told, _ = run_script(folder, script, dict(os.environ), timeout_s=880)
    return dict(zip(names, told.split(END_OF_BLOCK), strict=False))


def test_every_block_is_run_by_a_test() -> None:
    programs = {name for name in blocks(PAGE) if name.endswith(".py")}
    assert {*TRAJECTORY, *AVERAGES} == blocks(PAGE).keys() - programs
    assert blocks(PAGE, "output").keys() == {*TRAJECTORY, *AVERAGES} - {*SILENT}
    assert len(unnamed_commands(PAGE)) == 1, "only that of OMP_NUM_THREADS"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_is_stopped_within_an_epoch_takes_the_same_way(tmp_path: Path) -> None:
    told = told_by(tmp_path, TRAJECTORY)
    assert what_differs(PAGE, TRAJECTORY[1:], told) == [], told
    assert "51 of 51 steps have the same loss" in told["losses"]
    resumed = re.findall(r"step (\d+): .*resumed here", told["losses"])
    assert 20 < int(resumed[0]) < 34, "within the second epoch"
    digests = re.findall(r"\b[0-9a-f]{64}\b", told["compared"])
    assert len(digests) == 2
    assert len(set(digests)) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_averages_and_decays(tmp_path: Path) -> None:
    told = told_by(tmp_path, AVERAGES)
    names = [name for name in AVERAGES if name not in SILENT]
    assert what_differs(PAGE, names, told) == [], told
    digests = re.findall(r"\b[0-9a-f]{64}\b", told["decays"])
    assert len(set(digests)) == 1, "training does not notice its averages"
