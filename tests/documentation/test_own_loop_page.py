"""The scripts of docs/own_loop.md: what it costs to hand one over, and that it is exact then."""

from __future__ import annotations

import difflib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.exactness.trial import Trial
from holdfast.training.runs.paths import RunDirectory
from tests.documentation.pages import REPOSITORY
from tests.faults.campaign import differences, final_state

FOLDER = REPOSITORY / "docs" / "own_loop"
SHORT = ("--steps", "24", "--context", "12")
MAX_LINES = 10


def train(script: str, store: Path, trial: Trial) -> int:
    folders = {"HOLDFAST_STORE": str(store), "HOLDFAST_SCRATCH": str(store / "scratch")}
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *SHORT],
        env={**child_environment(1), **trial.environment(), **folders},
        check=False,
        capture_output=True,
    ).returncode


def test_a_script_is_handed_over_in_at_most_ten_lines() -> None:
    plain, kept = ((FOLDER / f"{n}.py").read_text().splitlines() for n in ("plain", "kept"))
    told = [line for line in difflib.ndiff(plain, kept) if line[0] in "+-" and line[2:].strip()]
    added = [line for line in told if line[0] == "+"]
    assert len(added) <= MAX_LINES
    assert len(added) < len(told) - len(added)
    page = (REPOSITORY / "docs" / "own_loop.md").read_text()
    assert "Six\nlines come in" in page
    assert len([line for line in added if not re.match(r'\+ """', line)]) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name"), [("kept.py", "gpt"), ("language_model.py", "own_language_model")]
)
def test_a_script_of_the_pages_is_exact(tmp_path: Path, script: str, name: str) -> None:
    plain = Trial(every_steps=5)
    assert train(script, tmp_path / "calm", plain) == 0
    for step, sent in ((8, "SIGKILL"), (13, "SIGTERM")):
        trial = Trial(every_steps=5, stop_at=step, stop_signal=sent)
        code = train(script, tmp_path / "stopped", trial)
        assert code == (75 if sent == "SIGTERM" else -signal.SIGKILL)
    assert train(script, tmp_path / "stopped", plain) == 0
    calm, stopped = (RunDirectory(tmp_path / n / name / "first") for n in ("calm", "stopped"))
    assert differences(final_state(calm), final_state(stopped)) == []
