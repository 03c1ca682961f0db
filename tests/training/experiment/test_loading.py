"""Finding an experiment by its reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast.training.configuration.schema import Section
from holdfast.training.errors import ExperimentError
from holdfast.training.experiment.loading import (
    default_values,
    experiment_name,
    load_experiment,
    settings_class,
)
from holdfast.training.experiment.protocol import REQUIRED_METHODS, Context, NoSettings
from holdfast.training.experiments import EXPERIMENTS

COMPLETE = "class Mine:\n    def __init__(self, context): self.context = context\n" + "".join(
    f"    def {name}(self, *args): return None\n" for name in REQUIRED_METHODS
)


def write(folder: Path, name: str, source: str) -> str:
    path = folder / name
    path.write_text(source, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_row_of_the_table_is_an_experiment(name: str) -> None:
    experiment_class = load_experiment(name)
    assert experiment_name(name) == name
    assert issubclass(settings_class(experiment_class), Section)


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ExperimentError, match=r"'digit'; did you mean digits\?.*file\.py:Class"):
        load_experiment("digit")


@pytest.mark.parametrize("reference", ["", ":Class", "a b:Class", "module:", "a..b:Class", "x/y:C"])
def test_a_reference_of_another_form_is_refused(reference: str) -> None:
    with pytest.raises(ExperimentError, match="there is no experiment"):
        experiment_name(reference)


def test_names_of_own_experiments_are_fit_for_a_directory() -> None:
    assert experiment_name("package.module:Mine") == "package.module.Mine"
    assert experiment_name("/some/where/task.py:Mine") == "task.Mine"


def test_a_file_outside_the_project_can_be_loaded_and_sees_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "neighbour_of_mine.py", "VALUE = 7\n")
    reference = write(tmp_path, "task.py", "from neighbour_of_mine import VALUE\n" + COMPLETE)
    found = load_experiment(f"{reference}:Mine")
    context = Context(seed=3)
    build: Any = found
    assert build(context).context is context
    assert load_experiment(f"{reference}:Mine") is found
    assert settings_class(found) is NoSettings
    assert default_values(found) == {}


def test_two_files_of_one_name_are_two_experiments(tmp_path: Path) -> None:
    first = load_experiment(write(tmp_path, "same.py", COMPLETE) + ":Mine")
    (tmp_path / "other").mkdir()
    second = load_experiment(write(tmp_path / "other", "same.py", COMPLETE) + ":Mine")
    assert first is not second


def test_a_module_can_be_loaded_by_its_dotted_name() -> None:
    assert load_experiment("holdfast.training.experiments.digits:Digits") is load_experiment(
        "digits"
    )


def test_a_missing_class_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    reference = write(tmp_path, "nearest.py", COMPLETE)
    with pytest.raises(ExperimentError, match=r"has no class Mime; did you mean Mine\?"):
        load_experiment(f"{reference}:Mime")


def test_a_class_without_all_methods_is_refused_by_the_names_it_lacks(tmp_path: Path) -> None:
    reference = write(tmp_path, "partial.py", "class Mine:\n    def model(self): ...\n")
    with pytest.raises(ExperimentError, match="Mine lacks dataset, loss, score, metrics"):
        load_experiment(f"{reference}:Mine")


@pytest.mark.parametrize(
    ("constructor", "told"),
    [
        ("pass", r"Mine\(context\), and cannot be: too many positional arguments; write def"),
        ("def __init__(self, context, width): pass", "missing a required argument: 'width'"),
        ("def __init__(self, *, context): pass", "too many positional arguments"),
    ],
)
def test_a_class_that_cannot_be_built_with_its_context_is_refused(
    tmp_path: Path, constructor: str, told: str
) -> None:
    source = COMPLETE.replace("def __init__(self, context): self.context = context", constructor)
    with pytest.raises(ExperimentError, match=told):
        load_experiment(write(tmp_path, "built.py", source) + ":Mine")


@pytest.mark.parametrize("settings", ["class Settings: width = 3", "Settings = {'width': 3}"])
def test_settings_that_are_no_section_are_refused(tmp_path: Path, settings: str) -> None:
    reference = write(tmp_path, "settings.py", f"{COMPLETE}    {settings}\n")
    with pytest.raises(ExperimentError, match=r"write class Settings\(holdfast.Section\)"):
        load_experiment(f"{reference}:Mine")


def test_something_that_is_no_class_is_refused(tmp_path: Path) -> None:
    reference = write(tmp_path, "value.py", "Mine = 3\n")
    with pytest.raises(ExperimentError, match="expected a class, found an int"):
        load_experiment(f"{reference}:Mine")


@pytest.mark.parametrize("source", ["import no_such_module_anywhere\n", "class Mine(:\n"])
def test_a_file_that_cannot_be_imported_is_named(tmp_path: Path, source: str) -> None:
    reference = write(tmp_path, "broken.py", source)
    for _ in range(2):
        with pytest.raises(ExperimentError, match=r"broken\.py cannot be imported: "):
            load_experiment(f"{reference}:Mine")


def test_a_missing_file_or_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"absent\.py does not exist"):
        load_experiment(f"{tmp_path / 'absent.py'}:Mine")
    with pytest.raises(ExperimentError, match="no_such_package"):
        load_experiment("no_such_package.module:Mine")


def test_defaults_are_a_copy() -> None:
    digits = load_experiment("digits")
    default_values(digits)["train"]["num_epochs"] = -1
    assert default_values(digits)["train"]["num_epochs"] > 0


def test_the_name_of_an_experiment_costs_no_import_of_torch() -> None:
    code = (
        "import sys; from holdfast.training.experiment.loading import experiment_name as n;"
        "assert n('digits') == 'digits' and n('a.b:C') == 'a.b.C'; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
