"""Write docs/command_line.md from the commands themselves.

python -P docs/site/command_line_page.py > docs/command_line.md
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from itertools import groupby

import click

from holdfast.flows.command_line.group import holdfast
from holdfast.training.command_line import main as training

HEAD = """\
# The command line

All commands and options, as `--help` tells them.

`holdfast` trains, exports and publishes, with Prefect around it. `python -m holdfast.training` is
what it runs: one stage, one process, without Prefect. Exit codes mean the same everywhere:

| exit code | meaning |
|---|---|
| 0 | done |
| 75 | stopped by a notice or Ctrl-C, and saved: the same command, or `holdfast resume`, goes on |
| 2 | wrong input: arguments, configuration, experiment, data; the same again ends the same way |
| 1 | failed; of a question such as `checkpoints diff`: no |
| 130 | stopped at once by Ctrl-C |

What is wrong is told in one line on stderr. With `--json`, stdout holds JSON and nothing else.
"""
PROGRAMS = {"holdfast": holdfast, "python -m holdfast.training": training}
VERBATIM = "\b"  # click's mark for a paragraph that is not to be filled


def page() -> str:
    """The whole page, as Markdown."""
    parts = [HEAD]
    for name, group in PROGRAMS.items():
        parts += [f"## `{name}`\n", *_described(group, click.Context(group, info_name=name))]
        for command, context in leaves(group, click.Context(group, info_name=name)):
            parts += [f"### `{context.command_path}`\n", *_described(command, context)]
    return "\n".join(parts)


def leaves(
    group: click.Group, context: click.Context
) -> Iterator[tuple[click.Command, click.Context]]:
    """Every command below a group, subgroups included, in the order in which it lists them."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        yield command, inner
        if isinstance(command, click.Group):
            yield from leaves(command, inner)


def _described(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"```text\n{usage}\n```\n"
    yield from _paragraphs(command.help or "")
    rows = [record for option in options(command, context) if (record := _row(option, context))]
    if rows:
        yield "\n".join(["| option | meaning |", "|---|---|", *rows]) + "\n"
    yield from _paragraphs(command.epilog or "")


def options(command: click.Command, context: click.Context) -> list[click.Parameter]:
    """What a command takes, without ``--help``, which each one has."""
    helping = command.get_help_option(context)
    found = command.get_params(context)
    return [option for option in found if isinstance(option, click.Option) and option != helping]


def _row(option: click.Parameter, context: click.Context) -> str | None:
    record = option.get_help_record(context)
    if record is None:
        return None
    name, meaning = (text.replace("|", "\\|") for text in record)
    return f"| `{name}` | {' '.join(meaning.split())} |"


def _paragraphs(text: str) -> Iterator[str]:
    for block in inspect.cleandoc(text).split("\n\n"):
        for part in block.split(f"{VERBATIM}\n"):
            yield from _verbatim(part) if "\n  " in part else _filled(part)


def _verbatim(block: str) -> Iterator[str]:
    """Lines as they stand: indented ones are what is typed, the others say what it does."""
    for is_typed, lines in groupby(block.strip("\n").split("\n"), lambda line: line[:1] == " "):
        text = "\n".join(lines)
        yield f"```text\n{textwrap.dedent(text)}\n```\n" if is_typed else f"{text}\n"


def _filled(block: str) -> Iterator[str]:
    if text := " ".join(block.split()):
        yield textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False) + "\n"


if __name__ == "__main__":
    click.echo(page(), nl=False)
