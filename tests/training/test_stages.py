"""How a stage tells its errors: a last line that says it all."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from holdfast.training.configuration.schema import Split
from holdfast.training.experiment.error_places import described
from holdfast.training.experiment.loading import load_experiment, source_digest
from holdfast.training.experiment.protocol import Batch, Context, Records
from holdfast.training.experiments import digits
from holdfast.training.stage import StageArguments, prepared_stage
from holdfast.training.stages import run_stage
from tests.faults.campaign import HARD
from tests.faults.hard_experiment import Hard, Spirals

OVERRIDES = ("preemption.sources=[]",)
REHEARSED = (*OVERRIDES, "rehearsal.depth=step")
THIS = f"{Path(__file__)}"


class Unlucky(Hard):
    """Fails where its model is built."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.error: Exception = KeyError("nothing")

    def model(self) -> Any:
        raise self.error


class Failing(Unlucky):
    """Fails without a message."""

    def model(self) -> Any:
        raise AssertionError


class BrokenRows(Spirals):
    """Cannot be loaded."""

    def __getitem__(self, index: int) -> Any:
        raise ValueError(f"row {index}\nis broken")


class Broken(Hard):
    """Has no sample that can be loaded, from the split ``where`` on."""

    where: Split = "train"

    def dataset(self, split: Split) -> Spirals:
        return BrokenRows(split) if split == self.where else Spirals(split)


class BrokenValidation(Broken):
    """Fails before training."""

    where: Split = "validation"


def prepared(experiment: str, store: Path) -> StageArguments:
    """What a run was begun with is written down."""
    arguments = StageArguments(experiment, store, "one", 1, overrides=OVERRIDES)
    with prepared_stage(arguments) as stage, stage.writing():
        return arguments


def test_a_run_that_goes_on_with_other_code_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Path(HARD.rpartition(":")[0]).read_text()
    digests = []
    for folder, text in [("a", source), ("b", source + "# another\n")]:
        path = tmp_path / folder / "hard.py"
        path.parent.mkdir()
        path.write_text(text)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        prepared(f"{path}:Hard", tmp_path)
        prepared(f"{path}:Hard", tmp_path)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert (
        f"that of Hard had the digest sha256:{digests[0]}, and {path}, with what it imports from "
        "its folder, has sha256:"
    ) in warned[0]
    assert digests[1] in warned[0]
    assert "take another run id" in warned[0]


def test_an_experiment_of_a_module_is_known_by_its_file_too() -> None:
    path = Path(digits.__file__)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_digest(load_experiment("digits")) == f"sha256:{expected}"
    assert source_digest(type("Dynamic", (), {"__module__": "builtins"})) is None


def test_code_beside_an_experiment_belongs_to_it_if_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("import net_of_task\n\nclass Task: pass\n")
    (tmp_path / "net_of_task.py").write_text(
        "def net():\n    from layers_of_task import DEPTH\n    return DEPTH\n"
    )
    (tmp_path / "layers_of_task.py").write_text("import json\nDEPTH = 3\n")
    (tmp_path / "other.py").write_text("SIZE = 1\n")
    program = (
        "import sys; sys.path.append(sys.argv[1]); import task; "
        "from holdfast.training.experiment.loading import source_digest; "
        "print(source_digest(task.Task))"
    )

    def digest() -> str:
        command = [sys.executable, "-c", program, str(tmp_path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    first = digest()
    (tmp_path / "other.py").write_text("SIZE = 2\n")
    assert digest() == first
    for name in ("task", "net_of_task", "layers_of_task"):
        before = digest()
        with (tmp_path / f"{name}.py").open("a") as file:
            file.write("# another\n")
        assert digest() != before, name


def told(
    name: str,
    store: Path,
    capsys: pytest.CaptureFixture[str],
    exit_code: int = 1,
    overrides: tuple[str, ...] = OVERRIDES,
) -> list[str]:
    outcome = run_stage(
        "segment",
        {
            "experiment": f"{THIS}:{name}",
            "store": store,
            "run_id": "one",
            "num_threads": 1,
            "overrides": overrides,
            "progress_format": "none",
        },
    )
    assert outcome.exit_code == exit_code
    return capsys.readouterr().err.splitlines()


class OneScore(Hard):
    """Scores a batch as a whole."""

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": super().score(model, batch)["loss"].mean()}


class WordyMetrics(Hard):
    """Has a metric that is no number."""

    def metrics(self, records: Records) -> dict[str, float]:
        return {**super().metrics(records), "verdict": "good"}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        pytest.param(
            "OneScore",
            "OneScore.score must return tensors with one row per sample, [64, ...]",
            marks=pytest.mark.slow,
        ),
        ("WordyMetrics", "WordyMetrics.metrics must return a number for each metric; 'verdict'"),
    ],
)
def test_what_would_fail_after_the_first_epoch_is_found_before_anything_is_written(
    name: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [error] = told(name, tmp_path, capsys, exit_code=2, overrides=REHEARSED)
    assert error.startswith(f"error: {line}")
    assert list(tmp_path.iterdir()) == []


class NotANumber(Hard):
    """Its model is as good as no number can tell."""

    def metrics(self, records: Records) -> dict[str, float]:
        return {"loss": math.inf, "accuracy": math.nan}


def strict(line: str) -> dict[str, Any]:
    """As every other reader of JSON than Python's has it."""
    event: dict[str, Any] = json.loads(line, parse_constant=pytest.fail)
    return event


def test_a_metric_that_is_not_a_number_is_warned_about_and_told_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"experiment": f"{THIS}:NotANumber", "store": tmp_path, "run_id": "one"}
    overrides = (*OVERRIDES, "train.max_steps=2")
    told = {"overrides": overrides, "num_threads": 1, "progress_format": "jsonl"}
    assert run_stage("segment", {**options, **told}).exit_code == 0
    events = [strict(line) for line in capsys.readouterr().out.splitlines()]
    [validation] = [event for event in events if event["event"] == "validation"]
    assert validation["metrics"] == {"loss": "inf", "accuracy": "nan"}
    assert "selection.metric = 'accuracy' is NaN after step 2" in caplog.text


@pytest.mark.parametrize(
    ("name", "line"), [("Unlucky", "KeyError: 'nothing'"), ("Failing", "AssertionError")]
)
def test_the_last_line_of_an_unforeseen_error_has_its_type_and_place(
    name: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told(name, tmp_path, capsys)
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith(f"error: {line} ({THIS}:")
    assert lines[-1].endswith(" in model)")


def test_an_error_of_a_data_set_is_one_line_that_names_where_the_traceback_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [line] = [one for one in told("Broken", tmp_path, capsys) if not one.startswith("INFO")]
    record = tmp_path / "test_stages.Broken" / "one" / "segments" / "0001.json"
    assert line.startswith("error: sample ")
    assert f"is broken ({THIS}:" in line
    assert line.endswith(f" in __getitem__); the traceback is in {record}")
    assert "raise ValueError" in record.read_text()


def test_before_there_is_a_record_the_traceback_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told("BrokenValidation", tmp_path, capsys, exit_code=2, overrides=REHEARSED)
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("error: sample 0 could not be loaded")


def test_an_error_within_a_library_is_placed_where_the_user_called_it() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        Path(str(int("three")))
    assert described(caught.value).endswith(
        " in test_an_error_within_a_library_is_placed_where_the_user_called_it)"
    )
