"""Warnings about exactness are errors where it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.errors import InexactError
from holdfast.training.exactness.strictness import strictness, warn_of_inexactness
from tests.faults.campaign import HARD, Training, complete


def test_a_warning_is_an_error_within_the_block_only(caplog: pytest.LogCaptureFixture) -> None:
    with strictness(True), pytest.raises(InexactError, match=r"other versions .--strict makes"):
        warn_of_inexactness("other versions")
    assert not caplog.records
    with strictness(False):
        warn_of_inexactness("other versions: 100%")
    assert caplog.messages == ["other versions: 100%"]


def test_a_stage_that_is_strict_does_not_go_on_with_other_code(tmp_path: Path) -> None:
    path = tmp_path / "hard.py"
    path.write_text(Path(HARD.rpartition(":")[0]).read_text())
    training = Training(tmp_path / "store", "one", f"{path}:Hard", ("train.max_steps=3",))
    complete(training)
    path.write_text(path.read_text() + "# changed\n")
    strict = training.start(arguments=("--strict",))
    assert strict.finish() == 2
    assert "was begun with other code" in strict.errors[-1]
    assert "(--strict makes this warning an error)" in strict.errors[-1]
    complete(training)
