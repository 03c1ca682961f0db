"""How a script names its run, read from its text: nothing of it is run."""

from __future__ import annotations

import ast
from pathlib import Path

FUNCTION = "run"
MODULE = "holdfast"


def named_run(script: Path) -> tuple[str | None, str | None]:
    """Experiment and run id that ``holdfast.run`` is called with, where they are plain text.

    None for what is computed, and for a file that is no Python: running it tells why.
    """
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None, None
    names = _names_of_function(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            return _text(node, 0, "experiment"), _text(node, 1, "run_id")
    return None, None


def _names_of_function(tree: ast.Module) -> set[str]:
    """What ``holdfast.run`` is called in a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [one for one in node.names if one.name == MODULE]
            names |= {f"{one.asname or MODULE}.{FUNCTION}" for one in named}
        elif isinstance(node, ast.ImportFrom) and node.module == MODULE:
            names |= {one.asname or FUNCTION for one in node.names if one.name == FUNCTION}
    return names


def _text(call: ast.Call, place: int, name: str) -> str | None:
    found = [keyword.value for keyword in call.keywords if keyword.arg == name]
    found += [*call.args[place : place + 1]]
    value = found[0].value if found and isinstance(found[0], ast.Constant) else None
    return value if isinstance(value, str) else None
