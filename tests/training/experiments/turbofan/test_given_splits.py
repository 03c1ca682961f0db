"""Validation and test engines that somebody else fixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.training.configuration.loading import resolve_config, validated
from holdfast.training.errors import ConfigError, DataFormatError, DataNotFoundError
from holdfast.training.experiment.protocol import Context
from holdfast.training.experiments.turbofan.data import (
    read_test_engines,
    read_training_engines,
    without_given,
)
from holdfast.training.experiments.turbofan.experiment import Turbofan, TurbofanSettings
from holdfast.training.experiments.turbofan.synthetic import Fleet, write_fleet

GIVEN_TEST = {"test_file": "given.txt", "test_rul_file": "given_rul.txt"}
NEW = ("validation_engines", "validation_file", "validation_rul_file", *GIVEN_TEST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten engines to train on, six to test; six others in given.txt, with given_rul.txt."""
    fleet = Fleet(num_train=10, num_test=6, shortest_life=50, longest_life=90)
    other = Fleet(num_train=4, num_test=6, shortest_life=50, longest_life=90, seed=1)
    _, test, rul = write_fleet(tmp_path / "other", other)
    test.rename(tmp_path / "given.txt")
    rul.rename(tmp_path / "given_rul.txt")
    write_fleet(tmp_path, fleet)
    return tmp_path


def make(folder: Path, **settings: Any) -> Turbofan:
    chosen = validated(TurbofanSettings, settings, prefix="experiment.")
    return Turbofan(Context(settings=chosen, data_folder=folder))


def engines(experiment: Turbofan, split: Any) -> list[int]:
    dataset = experiment.dataset(split)
    _, (_, engine, _) = dataset.fetch(np.arange(len(dataset)))
    return sorted(set(engine.tolist()))


def cut(path: Path, engine: int, num_cycles: int) -> str:
    """The first cycles of an engine, as engine 1."""
    rows = [line.split() for line in path.read_text().splitlines()]
    own = [row for row in rows if row[0] == str(engine)][:num_cycles]
    return "".join(" ".join(["1", *row[1:]]) + "\n" for row in own)


def test_named_engines_validate_and_the_others_train(folder: Path) -> None:
    experiment = make(folder, validation_engines=[7, 2])
    assert engines(experiment, "validation") == [2, 7]
    assert engines(experiment, "train") == [1, 3, 4, 5, 6, 8, 9, 10]


def test_a_given_file_validates_at_cuts_of_whole_lives(folder: Path) -> None:
    experiment = make(folder, validation_file="given.txt", validation_windows=3)
    assert len(engines(experiment, "train")) == 10
    dataset = experiment.dataset("validation")
    assert len(dataset) == 18
    assert experiment.dataset("train").fingerprint != make(folder).dataset("train").fingerprint


def test_given_engines_with_remaining_lives_are_scored_at_their_last_cycle(folder: Path) -> None:
    named = {"validation_file": "given.txt", "validation_rul_file": "given_rul.txt"}
    dataset = make(folder, **named).dataset("validation")
    assert len(dataset) == 6
    _, (rul, _, _) = dataset.fetch(np.arange(6))
    stated = [float(line) for line in (folder / "given_rul.txt").read_text().split()]
    assert rul.tolist() == stated


def test_a_given_test_needs_no_test_of_nasas(folder: Path) -> None:
    for name in ("test_FD001.txt", "RUL_FD001.txt"):
        (folder / name).unlink()
    experiment = make(folder, **GIVEN_TEST)
    assert len(experiment.dataset("test")) == 6
    assert len(experiment.dataset("train")) == len(make_usual(folder).dataset("train"))
    assert "Tested on the engines of given.txt." in experiment.export_spec().description


def make_usual(folder: Path) -> Turbofan:
    """The usual split, where NASA's test files were taken away."""
    for name in ("test_FD001.txt", "RUL_FD001.txt"):
        (folder / name).touch()
    return make(folder)


@pytest.mark.parametrize("num_cycles", [1, 20, 1000])
def test_an_engine_that_is_tested_is_left_out_of_training_and_counted(
    folder: Path, caplog: pytest.LogCaptureFixture, num_cycles: int
) -> None:
    (folder / "given.txt").write_text(cut(folder / "train_FD001.txt", 4, num_cycles))
    (folder / "given_rul.txt").write_text("12\n")
    experiment = make(folder, **GIVEN_TEST, validation_engines=[1])
    assert engines(experiment, "train") == [2, 3, 5, 6, 7, 8, 9, 10]
    assert engines(experiment, "test") == [1]
    assert caplog.messages == [
        "of 9 engines to train on, 1 are left out: a given validation or test file has them"
    ]


def test_an_engine_that_validates_and_is_tested_stays_in_both_and_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "given.txt").write_text(cut(folder / "train_FD001.txt", 4, 30))
    (folder / "given_rul.txt").write_text("12\n")
    experiment = make(folder, **GIVEN_TEST, validation_engines=[1, 4])
    assert engines(experiment, "validation") == [1, 4]
    assert len(engines(experiment, "train")) == 8
    [message] = caplog.messages
    assert message.startswith("1 of 2 validation engines are in the given test file, too")


def test_engines_that_begin_alike_and_go_on_otherwise_are_two(folder: Path) -> None:
    text = cut(folder / "train_FD001.txt", 4, 20).splitlines()
    text[-1] = " ".join([*text[-1].split()[:-1], "0.5"])
    (folder / "given.txt").write_text("\n".join(text))
    (folder / "given_rul.txt").write_text("12\n")
    assert 4 in engines(make(folder, **GIVEN_TEST, validation_engines=[1]), "train")


def test_a_file_with_all_of_training_is_refused(folder: Path) -> None:
    with pytest.raises(DataFormatError, match="all 10 engines to train on are in the given"):
        make(folder, validation_file="train_FD001.txt").dataset("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_file": "given.txt"}, "test_file and test_rul_file are named together"),
        ({"test_rul_file": "given_rul.txt"}, "test_file and test_rul_file are named together"),
        ({"validation_rul_file": "given_rul.txt"}, "belongs to a validation_file"),
        ({"validation_file": "given.txt", "validation_engines": [1]}, "not both"),
    ],
)
def test_what_is_half_given_or_given_twice_is_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make(folder, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([3, 11], r"names engine 11; the training file has the engines 1 to 10"),
        ([0], "names engine 0"),
        (list(range(1, 11)), "names all 10 engines of the training file; leave some"),
    ],
)
def test_engines_that_there_are_not_are_refused(
    folder: Path, numbers: list[int], message: str
) -> None:
    with pytest.raises(DataFormatError, match=message):
        make(folder, validation_engines=numbers).dataset("train")


def emptied(path: Path) -> None:
    path.write_text("")


def narrowed(path: Path) -> None:
    path.write_text("1 1 0.5\n")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (Path.unlink, DataNotFoundError, r"turbofan needs .*given\.txt.* is missing"),
        (emptied, DataFormatError, r"given\.txt: expected rows of 26 numbers, found none"),
        (narrowed, DataFormatError, r"given\.txt, line 1: expected 26 numbers, found 3 values"),
    ],
)
@pytest.mark.parametrize("settings", [{"validation_file": "given.txt"}, GIVEN_TEST])
def test_a_given_file_that_is_none_is_refused_before_training(
    folder: Path,
    settings: dict[str, Any],
    change: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    change(folder / "given.txt")
    with pytest.raises(error, match=message) as raised:
        make(folder, **settings).dataset("train")
    assert "\n" not in str(raised.value)


def test_lives_of_another_file_are_refused_before_training(folder: Path) -> None:
    (folder / "given_rul.txt").write_text("1\n")
    with pytest.raises(DataFormatError, match=r"6 engines of given\.txt, found 1"):
        make(folder, **GIVEN_TEST).dataset("train")


def test_a_split_that_is_not_given_is_no_part_of_a_configuration() -> None:
    config = resolve_config(settings_class=TurbofanSettings)
    assert not set(NEW) & set(config.experiment)


@pytest.mark.parametrize("subset", ["FD001", "FD002"])
def test_nasas_training_engines_are_not_among_its_test_engines(
    shared_data: Path, subset: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shared_data / "cmapss"
    train = read_training_engines(folder, subset)
    left = without_given(train, [read_test_engines(folder, subset)])
    assert left.fingerprint() == train.fingerprint()
    assert caplog.messages == []


def test_nasas_files_can_be_given_by_their_names(shared_data: Path) -> None:
    folder = shared_data / "cmapss"
    named = {"test_file": "test_FD001.txt", "test_rul_file": "RUL_FD001.txt"}
    given, usual = make(folder, **named), make(folder)
    for split in ("train", "validation", "test"):
        assert given.dataset(split).fingerprint == usual.dataset(split).fingerprint  # type: ignore[arg-type]
