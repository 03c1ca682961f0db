"""Every command and option has a text, and docs/command_line.md has all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "command_line_page", DOCS / "site" / "command_line_page.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()
COMMANDS: dict[str, tuple[click.Command, click.Context]] = {
    context.command_path: (command, context)
    for name, group in GENERATOR.PROGRAMS.items()
    for command, context in GENERATOR.leaves(group, click.Context(group, info_name=name))
}


def test_the_page_is_what_the_generator_prints() -> None:
    page = (DOCS / "command_line.md").read_text(encoding="utf-8")
    assert page == GENERATOR.page(), (
        "run: python -P docs/site/command_line_page.py > docs/command_line.md"
    )


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_says_what_it_does_and_how_it_ends(path: str) -> None:
    command, _ = COMMANDS[path]
    assert command.help
    if not isinstance(command, click.Group):
        assert str(command.epilog).startswith("Exit codes: 0 ")


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_has_a_help_text(path: str) -> None:
    command, context = COMMANDS[path]
    without = [option.name for option in GENERATOR.options(command, context) if not option.help]
    assert without == []


@pytest.mark.parametrize("path", COMMANDS)
def test_the_page_names_every_command_and_option(path: str) -> None:
    command, context = COMMANDS[path]
    page = GENERATOR.page()
    section = page.partition(f"### `{path}`\n")[2].partition("\n### ")[0]
    assert section
    for option in GENERATOR.options(command, context):
        assert all(f"`{name}" in section or f", {name}" in section for name in option.opts), path


def test_a_hidden_option_would_be_noticed() -> None:
    command = click.Command("secret", params=[click.Option(["--secret"], hidden=True)])
    context = click.Context(command)
    assert [option.name for option in GENERATOR.options(command, context)] == ["secret"]
    assert "--secret" not in "\n".join(GENERATOR._described(command, context))


def test_commands_of_all_levels_are_there() -> None:
    assert "holdfast checkpoints diff" in COMMANDS
    assert "python -m holdfast.training segment" in COMMANDS
    assert len(COMMANDS) > 25
