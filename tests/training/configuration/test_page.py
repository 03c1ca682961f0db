from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from holdfast.training.command_line import main

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"


def test_the_page_of_the_configuration_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(main, ["configuration"])
    assert printed.exit_code == 0
    assert printed.output == PAGE.read_text(encoding="utf-8"), (
        "run: python -m holdfast.training configuration > docs/configuration.md"
    )


def test_each_key_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    keys = [row for row in rows if row[0].startswith("| `")]
    assert len(keys) > 70
    assert [row[0] for row in keys if not row[3].strip()] == []


def test_help_names_the_page() -> None:
    printed = CliRunner().invoke(main, ["segment", "--help"])
    assert "docs/configuration.md" in " ".join(printed.output.split())
