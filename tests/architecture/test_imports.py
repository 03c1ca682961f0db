"""The direction of imports, read from the source itself, against the list in the documentation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "architecture.md"
PACKAGES = ("training", "tasks", "flows")
OURS = "holdfast."
MAX_MODULES = 17
# Who imports upward, and why.
UPWARD = {("training/experiment", "training/experiments"): "the table of built-in ones, by name"}
# Doors, above everything of their package; and what names the package alone.
DOORS = ("training/__main__.py", "training/__init__.py", "flows/__init__.py")


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
            # ``from package import module``
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & NAMES
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


def listed_rooms() -> dict[str, str]:
    """Rooms of the documentation, from the ground up, each with its line; ``tasks/`` is one."""
    [tree] = re.findall(r"```\n(training/\n.*?)```", PAGE.read_text(), re.S)
    rooms: dict[str, str] = {}
    package = ""
    for line in tree.splitlines():
        name, _, sentence = line.strip().partition(" ")
        if not line.startswith(" "):
            package = name.rstrip("/")
        if sentence:
            inside = name.rstrip("/")
            rooms[inside if inside == package else f"{package}/{inside}"] = sentence.strip()
    return rooms


def room_of(name: str) -> str:
    """The room of a module of ours; ``holdfast.training.loop.segment`` is in training/loop."""
    parts = name.removeprefix(OURS).split(".")
    if parts[0] == "tasks":
        return "tasks"
    room = "/".join(parts[:2])
    return room if (REPOSITORY / room).is_dir() else f"{room}.py"


NAMES = {
    OURS + ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in (REPOSITORY / package).rglob("*.py")
}
SOURCES = dict(modules())
ROOMS = listed_rooms()


def test_the_rooms_are_those_of_the_documentation() -> None:
    found = {"tasks"}
    for package in ("training", "flows"):
        for path in (REPOSITORY / package).iterdir():
            if path.suffix == ".py" or (path / "__init__.py").exists():
                found.add(path.relative_to(REPOSITORY).as_posix())
    assert found - {*DOORS} == ROOMS.keys()


@pytest.mark.parametrize("room", [room for room in ROOMS])
def test_a_room_says_of_itself_what_the_documentation_says(room: str) -> None:
    path = REPOSITORY / room
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path).read_text())
    assert (ast.get_docstring(tree) or "").splitlines()[0].startswith(ROOMS[room])


def test_no_room_imports_upward() -> None:
    order = {room: floor for floor, room in enumerate(ROOMS)}
    wrong = set()
    for name, tree in SOURCES.items():
        here = room_of(name)
        for target in imported(tree) & NAMES:
            there = room_of(target)
            if here in order and there in order and order[there] > order[here]:
                wrong.add((here, there))
    assert wrong == UPWARD.keys()


def test_no_folder_is_a_warehouse() -> None:
    for package in PACKAGES:
        for folder in [REPOSITORY / package, *(REPOSITORY / package).rglob("*/")]:
            modules_here = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(modules_here) <= MAX_MODULES, folder


def test_the_tests_mirror_the_rooms() -> None:
    shared = {"tests/training", "tests/flows", "tests/tasks"}
    folders = {
        path.parent.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / "tests" / package).rglob("test_*.py")
    }
    for folder in folders - shared:
        assert (REPOSITORY / folder.removeprefix("tests/") / "__init__.py").exists(), folder


def test_nothing_is_imported_by_its_old_name() -> None:
    places = [*SOURCES.items()]
    for folder in ("tests", "benchmarks", "holdfast"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            places.append((str(path), ast.parse(path.read_text())))
    wrong = [
        f"{place} imports {target}"
        for place, tree in places
        for target in imported(tree)
        if target.partition(".")[0] in PACKAGES
    ]
    assert wrong == []


def test_every_python_that_we_start_leaves_the_current_folder_out() -> None:
    wrong = []
    for name, tree in SOURCES.items():
        for node in ast.walk(tree):
            if not isinstance(node, (ast.List, ast.Tuple)):
                continue
            words = [ast.unparse(element) for element in node.elts]
            if words[:1] == ["sys.executable"] and words[1:2] != ["'-P'"]:
                wrong.append(f"{name}:{node.lineno}: {words}")
    assert wrong == []


def test_training_knows_nothing_of_prefect() -> None:
    wrong = [
        name
        for name, tree in SOURCES.items()
        if top(name) == "training" and any(top(target) == "prefect" for target in imported(tree))
    ]
    assert wrong == []


def test_flows_import_neither_torch_nor_what_imports_it() -> None:
    source = {name: imported(tree, at_import_time=True) for name, tree in SOURCES.items()}

    def reaches_torch(name: str, seen: set[str]) -> bool:
        if name in seen:
            return False
        seen.add(name)
        targets = source.get(name, set())
        return any(top(t) == "torch" or reaches_torch(t, seen) for t in targets)

    assert reaches_torch("holdfast.training.loop.segment", set())
    assert [n for n in source if top(n) == "flows" and reaches_torch(n, set())] == []


def test_there_are_no_import_cycles() -> None:
    source = {name: imported(tree) - {name} for name, tree in SOURCES.items()}
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
