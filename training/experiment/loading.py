"""Find an experiment by the name that the user gave.

A reference is a row of the table in ``holdfast.training.experiments``, ``package.module:Class``, or
``path/to/file.py:Class``. A training script with its own loop is named ``path/to/train.py``, or
``name=path/to/train.py`` where its runs lie in the folder ``name``. Nothing here imports torch
until a class is loaded.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import random
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from holdfast.training.errors import ExperimentError, kind_of
from holdfast.training.experiments import EXPERIMENTS, SAME_BYTES
from holdfast.training.runs.paths import RUN_ID, validate_run_id

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import Section
    from holdfast.training.experiment.protocol import Experiment


NOT_OF_NAMES = r"\W"


def experiment_name(reference: str) -> str:
    """Name of the experiment's directory in a store. Imports nothing of the experiment.

    The table's own name; ``package.module.Class`` or, for a file, ``file.Class`` for the others.
    For a script the name that the reference gives, or that of its file.

    Raises:
        ExperimentError: the reference is neither in the table nor of one of the other forms.
        InputError: the name of a script cannot be that of a folder.
    """
    if reference in EXPERIMENTS:
        return reference
    if is_script(reference):
        return validate_run_id(_script_parts(reference)[0])
    source, class_name = _parts(reference)
    return f"{Path(source).stem if _is_file(source) else source}.{class_name}"


def located_reference(reference: str, folder: str | None) -> str:
    """The same experiment; a file that is not found from here is named from ``folder``."""
    file, _, name = reference.rpartition(":")
    if not _is_file(file) or folder is None or Path(file).exists():
        return reference
    begun = Path(folder) / file
    return f"{begun}:{name}" if begun.exists() else reference


def is_script(reference: str) -> bool:
    """Whether a reference names a training script with its own loop."""
    return _is_file(reference)


def script_path(reference: str) -> Path:
    """The file of a script."""
    return Path(_script_parts(reference)[1])


def own_file(reference: str) -> Path | None:
    """The user's file that a reference names; None for a built-in experiment and for a module."""
    if is_script(reference):
        return script_path(reference)
    source = "" if reference in EXPERIMENTS else reference.rpartition(":")[0]
    return Path(source).expanduser() if _is_file(source) else None


def with_file(reference: str, path: Path) -> str:
    """The same experiment or script, in another file; the folder of its runs stays."""
    if is_script(reference):
        return f"{experiment_name(reference)}={path}"
    return f"{path}:{reference.rpartition(':')[2]}"


def load_experiment(reference: str) -> type[Experiment]:
    """The experiment's class, checked to have the five methods of ``Experiment``.

    Raises:
        ExperimentError: it cannot be found or imported, or is no experiment.
    """
    if is_script(reference):
        raise ExperimentError(
            f"{script_path(reference)} is a training script, and no experiment: holdfast run, exec "
            f"and verify-resume take scripts; of a file that holds an experiment write "
            f"{script_path(reference)}:Class"
        )
    source, class_name = _parts(EXPERIMENTS.get(reference, reference))
    with _drawing_the_same():
        module = _load_file(Path(source)) if _is_file(source) else _load_module(source)
    found = getattr(module, class_name, None)
    if found is None:
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise ExperimentError(
            f"experiment {reference}: {source} has no class {class_name}"
            f"{_did_you_mean(class_name, classes)}"
        )
    _check(reference, found)
    experiment_class: type[Experiment] = found
    return experiment_class


def load_class(reference: str) -> type[Any]:
    """A class that is named ``package.module:Class``; the module may lie beside the experiment.

    Raises:
        ExperimentError: it cannot be found or imported, or is no class.
    """
    source, _, class_name = reference.rpartition(":")
    if not class_name.isidentifier() or _is_file(source) or not _is_module(source):
        raise ExperimentError(f"expected package.module:Class, found {reference!r}")
    with _drawing_the_same():
        module = _load_module(source, "module")
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise ExperimentError(
            f"{source} has no class {class_name}{_did_you_mean(class_name, classes)}"
        )
    return found


def settings_class(experiment_class: type[Experiment]) -> type[Section]:
    """The class that validates the ``[experiment]`` table: ``Settings``, or one without keys."""
    from holdfast.training.experiment.protocol import NoSettings

    settings: type[Section] = getattr(experiment_class, "Settings", NoSettings)
    return settings


def default_values(experiment_class: type[Experiment]) -> dict[str, Any]:
    """Configuration values that the experiment prefers to the general defaults; a copy."""
    values: dict[str, Any] = getattr(experiment_class, "defaults", {})
    return {section: _copied(value) for section, value in values.items()}


def source_file(experiment_class: type[Experiment]) -> Path | None:
    """The file that the experiment's class is written in; None where there is none."""
    try:
        found = inspect.getsourcefile(experiment_class)
    except (TypeError, OSError):
        return None
    return None if found is None else Path(found)


def source_digest(
    experiment_class: type[Experiment], references: Iterable[str | None] = ()
) -> str | None:
    """``sha256:...`` of the experiment's code, so that other code is noticed.

    That is the file of its class, and the files in the same folder that it imports, directly or
    through each other, or that ``references`` such as ``module:Class`` name: there the network and
    the data often are. None where one can't be read.
    """
    path = source_file(experiment_class)
    package = experiment_class.__module__.rpartition(".")[0]
    modules = {(reference or "").rpartition(":")[0] for reference in references}
    return None if path is None else code_digest(path, package, modules)


def code_digest(path: Path, package: str = "", modules: Iterable[str] = ()) -> str | None:
    """``sha256:...`` of a file, of ``modules`` beside it, and of what they import beside them.

    ``package`` is what the file is part of. None where one can't be read.
    """
    contents: dict[Path, bytes] = {}
    waiting = {path.resolve(), *_beside(path.resolve(), package, set(modules))}
    try:
        while waiting:
            file = waiting.pop()
            contents[file] = file.read_bytes()
            waiting |= _imported_beside(file, contents[file], package) - contents.keys()
    except (OSError, SyntaxError, ValueError):
        return None
    digests = [hashlib.sha256(content).hexdigest() for _, content in sorted(contents.items())]
    if len(digests) > 1:
        digests = [hashlib.sha256("".join(digests).encode()).hexdigest()]
    return f"sha256:{digests[0]}"


def is_same_code(reference: str, digest: str | None) -> bool:
    """Whether an earlier digest of a built-in experiment is of code that gives the same bytes."""
    return digest in SAME_BYTES.get(reference, ())


def _imported_beside(path: Path, content: bytes, package: str) -> set[Path]:
    """Files in the same folder that a file of this package imports; whether now or later."""
    names = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package if node.level == 1 else ""
            base = ".".join(filter(None, (start, node.module)))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return _beside(path, package, names)


def _beside(path: Path, package: str, names: set[str]) -> set[Path]:
    """Files in the folder of ``path``, which is of a package, that hold modules of these names."""
    prefix = f"{package}." if package else ""
    stems = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    beside = {path.with_name(f"{stem}.py") for stem in stems if stem.isidentifier()}
    return {file for file in beside if file.is_file()}


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


@contextmanager
def _drawing_the_same() -> Iterator[None]:
    """What a module draws when it is imported is the same in every process.

    Torch's generator begins with the same seed in every process anyway.
    """
    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _script_parts(reference: str) -> tuple[str, str]:
    """Name and path of a script."""
    name, separator, path = reference.partition("=")
    is_named = bool(separator and RUN_ID.fullmatch(name))
    return (name, path) if is_named else (Path(reference).stem, reference)


def _is_file(source: str) -> bool:
    return source.endswith(".py")


def _parts(reference: str) -> tuple[str, str]:
    source, _, class_name = reference.rpartition(":")
    if source and class_name.isidentifier() and (_is_file(source) or _is_module(source)):
        return source, class_name
    raise ExperimentError(
        f"there is no experiment {reference!r}{_did_you_mean(reference, EXPERIMENTS)}; "
        f"known are {', '.join(sorted(EXPERIMENTS))}; "
        "your own are named package.module:Class or path/to/file.py:Class"
    )


def _is_module(source: str) -> bool:
    return all(part.isidentifier() for part in source.split("."))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _load_module(name: str, kind: str = "experiment module") -> ModuleType:
    """A module by its name; it may lie in the folder in which the user stands."""
    _search_last(Path.cwd())
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        raise ExperimentError(f"{kind} {name} cannot be imported: {error}") from error


def _load_file(path: Path) -> ModuleType:
    """The module of a file, imported once a process. It may import its neighbours.

    The file's folder goes to the end of the search path: a neighbour that is called like an
    installed module does not hide it.
    """
    path = path.resolve()
    if not path.is_file():
        raise ExperimentError(f"experiment file {path} does not exist; check the path")
    # An identifier, as TorchScript writes it into its files.
    name = f"holdfast_experiment_{re.sub(NOT_OF_NAMES, '_', path.stem)}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _search_last(path.parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        del sys.modules[name]
        raise ExperimentError(f"experiment file {path} cannot be imported: {error}") from error
    return module


def _search_last(folder: Path) -> None:
    """Let imports find what lies in a folder, after all that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _check(reference: str, found: object) -> None:
    from holdfast.training.configuration.schema import Section
    from holdfast.training.experiment.protocol import REQUIRED_METHODS

    if not inspect.isclass(found):
        raise ExperimentError(f"experiment {reference}: expected a class, found {kind_of(found)}")
    steps_itself = callable(getattr(found, "training_step", None))
    required = [name for name in REQUIRED_METHODS if not (name == "loss" and steps_itself)]
    missing = [name for name in required if not callable(getattr(found, name, None))]
    if missing:
        raise ExperimentError(
            f"experiment {reference}: an experiment has the methods {', '.join(REQUIRED_METHODS)}; "
            f"{found.__name__} lacks {', '.join(missing)}"
        )
    _check_constructor(reference, found)
    experiment_class: Any = found
    settings: Any = settings_class(experiment_class)
    if not (inspect.isclass(settings) and issubclass(settings, Section)):
        raise ExperimentError(
            f"experiment {reference}: {found.__name__}.Settings is no subclass of Section: write "
            f"class Settings(holdfast.Section)"
        )


def _check_constructor(reference: str, experiment_class: type[Any]) -> None:
    try:
        signature = inspect.signature(experiment_class)
    except ValueError:
        return  # one that is written in C and does not tell
    try:
        signature.bind(object())
    except TypeError as error:
        name = experiment_class.__name__
        raise ExperimentError(
            f"experiment {reference}: {name} is built as {name}(context), and cannot be: {error}; "
            f"write def __init__(self, context)"
        ) from error
