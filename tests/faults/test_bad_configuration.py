"""What a process of training says to a configuration that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import Training


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["checkpoint.keep_above.accurracy=0.1"], "checkpoint.keep_above = 'accurracy' is not a"),
        pytest.param(
            ["scheduler.name=OneCycleLR", "scheduler.args={max_lr = 0.1, total_steps = 3}"],
            "write scheduler.args.total_steps=",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_only_the_parts_can_tell_is_told_before_training(
    tmp_path: Path, overrides: list[str], part: str
) -> None:
    overrides = [*overrides, "rehearsal.depth=step"]
    segment = Training(tmp_path / "store", "bad", overrides=overrides).start()
    code, errors = segment.finish(), "".join(segment.errors)
    assert (code, part in errors) == (2, True), errors
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("overrides", [[], ["train.num_threads=1"]])
def test_a_value_in_place_of_a_table_of_the_file_is_one_line(
    tmp_path: Path, overrides: list[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("train = 3")
    training = Training(tmp_path / "store", "bad", overrides=overrides)
    segment = training.start(arguments=["--config", str(file)])
    code, errors = segment.finish(), "".join(segment.errors)
    assert (code, "train = 3: expected a table" in errors) == (2, True), errors
    assert "Traceback" not in errors


def test_two_configuration_files_are_refused(tmp_path: Path) -> None:
    arguments = ["--config", "a.toml", "--config", "b.toml"]
    segment = Training(tmp_path / "store", "bad").start(arguments=arguments)
    code, errors = segment.finish(), "".join(segment.errors)
    assert (code, "--config may be given once" in errors) == (2, True), errors
