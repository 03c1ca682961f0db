"""Text from elsewhere is shown as text, wherever it comes out."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast.flows.command_line.group import exit_code_of
from holdfast.training.bundles.console import main as console_main
from holdfast.training.bundles.model_card import model_card
from holdfast.training.bundles.registry import Registry
from holdfast.training.errors import InputError
from holdfast.training.reporting.markup import text
from holdfast.training.runs.progress import Progress
from holdfast.training.runs.shown_text import ShownFormatter, shown, shown_lines
from holdfast.training.told_errors import told_errors
from tests.safety.hostile import ESCAPES
from tests.safety.test_bundles import FACTS, write_bundle

HOSTILE = f"a|b`c`<script>alert(1)</script>[x](http://evil)\n# verified {ESCAPES}"


def test_the_errors_of_commands_and_scripts_are_one_line_of_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left, told_errors():
        raise InputError(f"no run {HOSTILE}")
    assert left.value.code == 2
    assert_plain(capsys.readouterr().err)
    script = tmp_path / "train.py"
    script.write_text(
        "import holdfast\n"
        "from holdfast.training.errors import InputError\n"
        "holdfast.run('gpt', 'first')\n"
        f"raise InputError({HOSTILE!r})\n"
    )
    ended = subprocess.run(
        [sys.executable, "-P", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert_plain(ended.stderr.splitlines()[-1])


def assert_plain(told: str) -> None:
    [line] = told.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain", "plain"),
        ("a\nb", "a\\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202eok", "\\u202eok"),
        ("\ud800", "\\ud800"),
        ("\u2028", "\\u2028"),
        ("äß 日本", "äß 日本"),
        (5, "5"),
        ("x" * 9, "xxxxx…"),
    ],
)
def test_what_does_not_print_is_shown_by_its_code(value: object, expected: str) -> None:
    assert shown(value, 5 if value == "x" * 9 else 100) == expected


def test_lines_are_kept_where_they_are_ours() -> None:
    assert shown_lines("a\x07\nb\r") == "a\\x07\nb\\r"
    record = logging.LogRecord("x", logging.INFO, "", 0, "name %s", ("\x1b[2J",), None)
    assert ShownFormatter("%(message)s").format(record) == "name \\x1b[2J"


def test_a_report_shows_codes_and_escapes_markup() -> None:
    assert text("<b>\x1b") == "&lt;b&gt;\\x1b"


def test_progress_on_a_terminal_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("text").emit("validation", metrics={HOSTILE: 0.5}, reason=HOSTILE)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.strip().isprintable()


def test_bundles_and_their_history_are_listed_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(tmp_path / "store")
    champion = {"name": "last", "test_metrics": {HOSTILE: 0.5}}
    registry.publish(write_bundle(tmp_path / "source", champion=champion))
    registry.move_alias("digits", "champion", 1, reason=HOSTILE, after=None)
    store = str(tmp_path / "store")
    for arguments in (["bundles", "--store", store], ["bundles", "digits", "--store", store]):
        assert console_main(arguments) == 0
        assert exit_code_of(arguments) == 0
        assert capsys.readouterr().out.replace("\n", "").isprintable()


def test_columns_of_predictions_are_text(tmp_path: Path) -> None:
    from holdfast.training.bundles import consumer

    interface = {**FACTS["interface"], "class_names": {"y": [HOSTILE, "one"]}}
    folder = write_bundle(tmp_path / "b", interface=interface)
    (tmp_path / "samples.csv").write_text("a,b\n1,2\n")
    consumer.compute(folder, tmp_path / "samples.csv", tmp_path / "out.csv")
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2


def test_the_model_card_escapes_what_it_inserts() -> None:
    manifest: dict[str, Any] = {
        **FACTS,
        "champion": {"name": HOSTILE, "test_metrics": {HOSTILE: 0.5}},
        "description": HOSTILE,
        "interface": {
            "class_names": {HOSTILE: [HOSTILE]},
            "inputs": [{"name": HOSTILE, "dtype": "float32", "shape": [2]}],
            "outputs": [{"name": HOSTILE, "dtype": "float32", "shape": [2]}],
        },
        "licence": HOSTILE,
        "name": HOSTILE,
        "run": {"run_id": HOSTILE},
    }
    row = {"name": HOSTILE, "format": f"{HOSTILE}.onnx", "size_bytes": 3}
    parity = {"artifacts": [{**row, "max_error": None, "bound": None}]}
    card = model_card(manifest, parity, HOSTILE)
    front, body = card.split("---\n")[1:]
    assert all(json.loads(line.partition(": ")[2]) for line in front.splitlines())
    assert "<script" not in re.sub(r"`[^`]*`", "", body)  # code is shown as it is
    assert "\x1b" not in card
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert [line[:14] for line in headings] == [
        line[:14] for line in (headings[0], "## On the test set", "## Inputs", "## Outputs",
                               "## Files", "## Check it, use it")
    ]  # fmt: skip
    for line in body.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (3, 4, 5), line
