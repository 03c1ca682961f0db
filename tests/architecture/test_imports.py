"""The direction of imports, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("training", "tasks", "flows")
OURS = "holdfast."


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            yield OURS + name.removesuffix(".__init__"), ast.parse(path.read_text())


def imported(tree: ast.Module, *, at_import_time: bool = False) -> set[str]:
    """Full names of the modules that a module imports."""
    names: set[str] = set()
    for node in _nodes(tree, at_import_time):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def _nodes(tree: ast.AST, at_import_time: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if at_import_time and (is_function or _is_type_checking(node)):
            continue
        yield node
        yield from _nodes(node, at_import_time)


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def top(name: str) -> str:
    """The package of ours, or the foreign one."""
    return name.removeprefix(OURS).partition(".")[0]


def test_no_package_imports_upward() -> None:
    order = {"training": 0, "tasks": 1, "flows": 2}
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        for target in imported(tree)
        if order.get(top(target), -1) > order[top(name)]
    ]
    assert wrong == []


def test_training_knows_nothing_of_prefect() -> None:
    wrong = [
        name
        for name, tree in modules()
        if top(name) == "training" and any(top(target) == "prefect" for target in imported(tree))
    ]
    assert wrong == []


def test_flows_import_neither_torch_nor_what_imports_it() -> None:
    source = {name: imported(tree, at_import_time=True) for name, tree in modules()}

    def reaches_torch(name: str, seen: set[str]) -> bool:
        if name in seen:
            return False
        seen.add(name)
        targets = source.get(name, set())
        return any(top(t) == "torch" or reaches_torch(t, seen) for t in targets)

    assert reaches_torch("holdfast.training.loop.segment", set())
    assert [n for n in source if top(n) == "flows" and reaches_torch(n, set())] == []


def test_there_are_no_import_cycles() -> None:
    source = {name: imported(tree, at_import_time=True) for name, tree in modules()}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in source and name not in finished:
            for target in sorted(source[name]):
                visit(target, (*path, name))
            finished.add(name)

    for name in source:
        visit(name, ())


@pytest.mark.parametrize(
    "module",
    [
        "holdfast.training.runs.lease",
        "holdfast.training.preemption.notices",
        "holdfast.training.runs.directory",
        "holdfast.training.configuration.schema",
    ],
)
def test_what_the_command_line_reads_with_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_training_loads_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import holdfast.training;"
        "print([m for m in set(sys.modules) - before if m.startswith(('torch', 'numpy', 'pyd'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
