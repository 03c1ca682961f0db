"""Verify a bundle and predict with it, on a machine that has only ONNX Runtime and NumPy.

This file stands alone: Holdfast imports it, and every bundle carries a copy as ``verify.py``.

    python verify.py                         in the bundle's folder: files, then golden samples
    python verify.py verify FOLDER
    python verify.py predict FOLDER INPUT    CSV, NPY or JSON in, the same out

Exit codes: 0 good, 1 refused, 2 wrong input. A bundle from a stranger is better verified with
``holdfast verify``: then no code of the bundle runs. A model runs in a process of its own, which
may crash, and is ended when it takes longer than the time limit.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PULLED = "pulled.json"  # written by a partial pull: which formats were asked for
OWN_FILES = (MANIFEST, PULLED)  # which no manifest may name
MODEL = "1/model.onnx"
INT8_MODEL = "onnx_int8/model.onnx"
RANGES = "ranges.json"  # of validation data; bundles of earlier versions have none
RANGE_SLACK = 1e-3  # of a range, by which floating-point values may leave it
QUANTILE_SLACK = 1 / 128  # quantiles are rounded by so much
MAX_BEYOND = 0.01  # part of the values; of validation data 0.002 lie beyond the outer quantiles
MIN_BEYOND = 10
MAX_WARNINGS = 64
WARNING = "warning: "
CHUNK_BYTES = 1 << 20
INPUT_KINDS = (".csv", ".npy", ".json")
MAX_JSON_BYTES = 64 << 20
MAX_INPUT_BYTES = 4 << 30
MAX_DEPTH = 100  # of JSON, and of folders
MAX_CHARS = 2000
SHA256 = re.compile(r"[0-9a-f]{64}")
SIZE_NAME = re.compile(r"[A-Za-z_]\w{0,199}", re.ASCII)
DTYPE = re.compile(r"(b?float|complex|u?int)(8|16|32|64|128)|bool")
NPY_MAGIC = b"\x93NUMPY"
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
TIME_LIMIT_S = 600.0
MIN_TIME_LIMIT_S = 0.1
MAX_TIME_LIMIT_S = 30 * 24 * 3600.0
LATE_CODE = 3


class RefusedBundleError(Exception):
    """The bundle is not what its manifest says; the message names the file."""


class WrongInputError(ValueError):
    """The input of a prediction does not fit the model."""


def shown(value: object, max_chars: int = MAX_CHARS) -> str:
    """``str(value)`` on one line of printable characters, cut where it is longer."""
    text = str(value)
    cut = text if len(text) <= max_chars else f"{text[:max_chars]}…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def canonical_bytes(value: Any) -> bytes:
    """The one way in which a manifest is written."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_digest"}
    return hashlib.sha256(canonical_bytes(rest)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a plain file; a symlink is not followed. Raises OSError."""
    digest = hashlib.sha256()
    with open_plain(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def open_plain(path: Path) -> Any:
    """A stream of a plain file's bytes. Raises OSError where it is a link, a FIFO, a folder …"""
    stream = os.fdopen(os.open(path, OPEN_FLAGS), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(f"{path} is no plain file")
    return stream


def read_plain(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a plain file. Raises OSError, or ValueError where it is larger."""
    with open_plain(path) as stream:
        content: bytes = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path.name} has more than {max_bytes:,} bytes")
    return content


def parse_json(content: bytes) -> Any:
    """The value of JSON text. Raises ValueError, also for what nests too deep."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"it nests more than {MAX_DEPTH} deep") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"it nests more than {MAX_DEPTH} deep")
        nests = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))
        ]
        level = [item for nest in nests for item in nest]
    return value


def entries(folder: Path) -> list[tuple[str, Path, int]]:
    """Name, path and mode of all that is below a folder, sorted; no link is followed.

    Raises OSError.
    """
    found, left = [], [(folder, 0)]
    while left:
        place, depth = left.pop()
        if depth > MAX_DEPTH:
            raise OSError(f"its folders nest more than {MAX_DEPTH} deep")
        for entry in os.scandir(place):
            path, mode = Path(entry.path), entry.stat(follow_symlinks=False).st_mode
            found.append((path.relative_to(folder).as_posix(), path, mode))
            if stat.S_ISDIR(mode):
                left.append((path, depth + 1))
    return sorted(found)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own digest, with no path that leaves the folder.

    Raises:
        RefusedBundleError: it is missing, altered, of another format version, or names such a path.
    """
    try:
        content = read_plain(folder / MANIFEST)
    except OSError:
        message = f"{MANIFEST} is missing or no regular file in {shown(folder)}"
        raise RefusedBundleError(message) from None
    except ValueError as error:
        raise RefusedBundleError(f"{shown(folder)}: {error}") from error
    return parse_manifest(content)


def parse_manifest(content: bytes) -> dict[str, Any]:
    """As ``read_manifest``, from the manifest's bytes."""
    try:
        manifest = parse_json(content)
        is_own = canonical_bytes(manifest) == content and isinstance(manifest, dict)
    except ValueError as error:
        raise RefusedBundleError(f"{MANIFEST} is not JSON: {shown(error)}") from error
    if not is_own or manifest.get("manifest_digest") != manifest_digest(manifest):
        raise RefusedBundleError(f"{MANIFEST} was altered: its bytes do not have its own digest")
    if manifest.get("format_version") != FORMAT_VERSION:
        version = shown(manifest.get("format_version"), 40)
        raise RefusedBundleError(
            f"{MANIFEST} has format version {version}; this program reads "
            f"{FORMAT_VERSION}: take a newer one"
        )
    try:
        _check_facts(manifest)
        for name, entry in manifest["files"].items():
            check_name(name)
            if not _is_size(entry["size_bytes"]) or not SHA256.fullmatch(entry["sha256"]):
                raise ValueError(f"{name} has {entry}")
        for prefix, graph in graphs(manifest):
            check_name(f"{prefix}{MODEL}")
            _check_graph(graph, manifest["files"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"{MANIFEST} does not describe a bundle: {shown(repr(error), 300)}"
        raise RefusedBundleError(message) from error
    return dict(manifest)


def _check_facts(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError, or what Python raises, where what is shown of a bundle is not as such."""
    name = manifest["name"]
    if not isinstance(name, str) or not name or shown(name, 255) != name or set(name) & set(":/\\"):
        raise ValueError(f"its name is {name!r}")
    metrics = manifest["champion"]["test_metrics"]
    if not all(value is None or _is_number_value(value) for value in metrics.values()):
        raise ValueError(f"its metrics are {metrics}")
    if not isinstance(manifest["run"]["run_id"], str):
        raise ValueError(f"its run is {manifest['run']}")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_dimension(value: object) -> bool:
    """Whether it is a size, or the name of one that may vary."""
    return _is_size(value) or (isinstance(value, str) and SIZE_NAME.fullmatch(value) is not None)


def _is_number_value(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def graphs(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The model and its parts, if it has any: folder with a slash, ``formats``, ``interface``."""
    yield "", manifest
    for name, part in manifest.get("parts", {}).items():
        yield f"parts/{name}/", part


def _check_graph(graph: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Raises ValueError, or what Python raises, where a graph is not described as one."""
    if missing := sorted({e["path"] for e in graph["formats"].values()} - set(files)):
        raise ValueError(f"there is no {missing[0]}")
    ports = [*graph["interface"]["inputs"], *graph["interface"]["outputs"]]
    for port in ports:
        if not isinstance(port["name"], str) or not all(map(_is_dimension, port["shape"])):
            raise ValueError(f"{port} is no input or output")
        if not DTYPE.fullmatch(port["dtype"]):
            raise ValueError(f"{port} has a type that is none")
    classes = graph["interface"].get("class_names", {})
    if not all(isinstance(label, str) for labels in classes.values() for label in labels):
        raise ValueError("the names of its classes are none")


def check_name(name: str) -> None:
    """Raises RefusedBundleError for a path that could leave the folder, or is not portable."""
    parts = PurePosixPath(name).parts
    is_plain = name == "/".join(parts) and bool(parts) and not name.startswith("/")
    is_safe = ".." not in parts and not any(c in name for c in "\\:") and shown(name) == name
    if not is_plain or not is_safe or name in OWN_FILES:
        message = f"{MANIFEST} names {shown(repr(name), 300)}, which is not a path in the bundle"
        raise RefusedBundleError(message)


def wanted_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The files that must be there: all, or those of the formats that a partial pull asked for."""
    path = folder / PULLED
    files: dict[str, Any] = dict(manifest["files"])
    if not path.is_file() or path.is_symlink():
        return files
    try:
        only = parse_json(read_plain(path))["only"]
        unknown = sorted(set(only) - set(manifest["formats"]))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise RefusedBundleError(f"{PULLED} was altered: {shown(repr(error), 300)}") from error
    if unknown:
        message = f"{PULLED} was altered: there is no format {shown(repr(unknown[0]), 300)}"
        raise RefusedBundleError(message)
    return chosen_files(manifest, only)


def chosen_files(manifest: Mapping[str, Any], only: list[str]) -> dict[str, Any]:
    """The files of some formats, and everything that belongs to no format."""
    unwanted = {
        entry["path"]
        for _, graph in graphs(manifest)
        for name, entry in graph["formats"].items()
        if name not in only
    }
    folders = {name.rpartition("/")[0] for name in unwanted} - {""}  # 1/MLmodel goes with its model
    return {
        name: entry
        for name, entry in manifest["files"].items()
        if name not in unwanted and name.rpartition("/")[0] not in folders
    }


def file_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Everything that differs from the manifest: missing, altered, added, or no regular file."""
    wanted = wanted_files(folder, manifest)
    found = {}
    for name, path, mode in entries(folder):
        if stat.S_ISREG(mode):
            found[name] = path
        elif not stat.S_ISDIR(mode):
            yield f"{shown(name)} is a symlink or special file; a bundle has regular files alone"
    for name in sorted(set(found) - set(wanted) - {*OWN_FILES}):
        yield f"{shown(name)} is not in the manifest; it was added"
    for name, entry in sorted(wanted.items()):
        if name not in found:
            yield f"{name} is missing"
        elif (size := found[name].stat().st_size) != entry["size_bytes"]:
            yield f"{name} has {size} bytes, the manifest says {entry['size_bytes']}"
        elif (digest := file_digest(found[name])) != entry["sha256"]:
            yield f"{name} was altered: sha256 {digest[:12]}…, not {entry['sha256'][:12]}…"


def verify_files(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle all of whose files are right. Raises RefusedBundleError."""
    manifest = read_manifest(folder)
    try:
        problems = list(file_problems(folder, manifest))
    except OSError as error:
        raise RefusedBundleError(
            f"bundle {shown(folder)} cannot be read: {shown(error)}"
        ) from error
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RefusedBundleError(f"bundle {shown(folder)}: {problems[0]}{more}")
    return manifest


def verify_golden(folder: Path) -> int:
    """Run the golden samples on this machine; the number of compared arrays.

    0 where the bundle has no ONNX file, or a partial pull left it out. Call ``verify_files``
    before. Raises RefusedBundleError with the case, the output, and figures.
    """
    manifest = read_manifest(folder)
    num_compared = 0
    for prefix, graph, path in _models(folder, manifest):
        try:
            num_compared += _verify_golden_of(folder, manifest, graph, prefix, path)
        except RefusedBundleError:
            raise
        except Exception as error:  # of what a stranger wrote, or of a runtime
            message = f"{path} cannot be proved: {type(error).__name__}: {_first_line(error)}"
            raise RefusedBundleError(message) from error
    if not num_compared and "onnx" in manifest["formats"] and not (folder / PULLED).is_file():
        raise RefusedBundleError(f"bundle {shown(folder)} holds no ONNX model or no golden samples")
    return num_compared


def _models(
    folder: Path, manifest: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """The ONNX files that are there: prefix, graph and path of each."""
    for prefix, graph in graphs(manifest):
        for path in (f"{prefix}{MODEL}", f"{prefix}{INT8_MODEL}"):
            if path in manifest["files"] and (folder / path).is_file():
                yield prefix, graph, path


def _verify_golden_of(
    folder: Path, manifest: Mapping[str, Any], graph: Mapping[str, Any], prefix: str, path: str
) -> int:
    """Run one ONNX file on the golden samples of its graph; the number of compared arrays."""
    import numpy as np

    def array(case: str, kind: str, port: str) -> Any:
        name = f"{prefix}golden/{case}.{kind}.{port}.npy"
        if name not in manifest["files"]:
            asked = shown(name, 300)
            message = f"{prefix}golden/golden.json asks for {asked}, which is in no {MANIFEST}"
            raise RefusedBundleError(message)
        return _load_array(folder / name)

    golden = parse_json(read_plain(folder / f"{prefix}golden/golden.json"))
    session, num_compared = open_session(folder / path), 0
    for case in golden["cases"]:
        ports = graph["interface"]["inputs"]
        inputs = {port["name"]: array(case["name"], "input", port["name"]) for port in ports}
        try:
            outputs = run(session, graph, inputs)
        except WrongInputError as refusal:
            where = f"golden case {shown(case['name'], 100)}"
            message = f"{path} does not run here on {where}: {refusal}"
            raise RefusedBundleError(message) from refusal
        for name, tolerance in case["tolerances"].items():
            limit = golden["int8_tolerance"] if path.endswith(INT8_MODEL) else tolerance
            error = _scaled_error(np, outputs[name], array(case["name"], "output", name))
            num_compared += 1
            if not error <= limit:
                raise RefusedBundleError(
                    f"{path} gives wrong numbers here: golden case {shown(case['name'], 100)}, "
                    f"output {shown(name, 100)}: scaled error {error:.3g}, tolerance {limit:.3g}"
                )
    return num_compared


def proof(folder: Path, time_limit_s: float = TIME_LIMIT_S) -> str:
    """Verify files and golden samples; one line that says so. Raises RefusedBundleError.

    The golden samples run in a process of their own, for so many seconds at most.
    """
    manifest = verify_files(folder)
    has_models = any(_models(folder, manifest))
    num = (
        int(_in_child(["golden", str(folder)], time_limit_s))
        if has_models
        else verify_golden(folder)
    )
    if not num:
        reason = "no ONNX model was pulled"
        if "onnx" not in manifest["formats"]:
            reason = f"it was exported without ONNX, as {', '.join(sorted(manifest['formats']))}"
        return f"{manifest['name']}: all files are right; {reason}, none was run"
    return f"{manifest['name']}: all files and {num} golden outputs are right on this machine"


def _in_child(arguments: list[str], time_limit_s: float) -> str:
    """What this program prints for these arguments, run in a process of its own.

    Raises what it was refused with; RefusedBundleError, too, where it crashes or takes too long.
    """
    for name in ("numpy", "onnxruntime"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    # Python 3.10, which a bundle may well be used with, knows no -P.
    safe = ["-P"] if hasattr(sys.flags, "safe_path") else []
    python = sys.executable
    command = [python, *safe, str(Path(__file__).absolute()), *arguments]
    command += ["--time-limit-s", repr(time_limit_s)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=time_limit_s + 30,
        )
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, LATE_CODE, b"", b"")
    if done.returncode == 0:
        lines = done.stderr.decode(errors="replace").splitlines()
        for line in [line for line in lines if line.startswith(WARNING)][:MAX_WARNINGS]:
            print(shown(line), file=sys.stderr)
        return done.stdout.decode(errors="replace")
    told = (done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode in (1, 2) and told.startswith("error: "):
        kind = WrongInputError if done.returncode == 2 else RefusedBundleError
        raise kind(shown(told.removeprefix("error: ")))
    raise RefusedBundleError(_why_ended(done.returncode, told, time_limit_s))


def _why_ended(code: int, told: str, time_limit_s: float) -> str:
    if code == LATE_CODE:
        return (
            f"the model was still running after {time_limit_s:g} s, and was ended: it may never "
            "come to an end; allow it more with --time-limit-s"
        )
    how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    return f"the process that ran the model ended with {how}: {shown(told, 300)}"


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, graph: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name. Raises WrongInputError where a shape or a value does not fit.

    ``graph`` is the manifest, or what it says of a part.
    """
    numbers = {name: len(array) if array.ndim else 0 for name, array in inputs.items()}
    if len(set(numbers.values())) > 1:
        raise WrongInputError(f"the inputs have different numbers of samples: {numbers}")
    checked: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for port in graph["interface"]["inputs"]:
        array = inputs[port["name"]]
        if not array.ndim or not len(array) or not _fits(array.shape[1:], port["shape"], sizes):
            known = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise WrongInputError(
                f"input {shown(port['name'], 100)} has shape {list(array.shape)}; expected "
                f"[samples, {', '.join(map(str, port['shape']))}] with at least one sample"
                f"{f', where {known}' if known else ''}"
            )
        checked[port["name"]] = _as_type(array, port)
    names = [port["name"] for port in graph["interface"]["outputs"]]
    try:
        outputs = dict(zip(names, session.run(names, checked), strict=True))
    except Exception as error:  # ONNX Runtime has classes of its own
        raise WrongInputError(
            f"ONNX Runtime cannot compute this input; is a value out of range? {_first_line(error)}"
        ) from error
    for name, array in outputs.items():
        num_samples = next(iter(numbers.values()), None)
        if getattr(array, "dtype", None) is None or array.dtype.kind not in "iufb":
            raise RefusedBundleError(f"output {shown(name, 100)} holds no numbers")
        if not array.ndim or len(array) != num_samples:
            raise RefusedBundleError(
                f"output {shown(name, 100)} has the shape {list(array.shape)} for {num_samples} "
                "samples; expected one row for each"
            )
    return outputs


def _fits(found: tuple[int, ...], wanted: list[Any], sizes: dict[str, int]) -> bool:
    """Whether a shape is as wanted; ``sizes`` learns what a name stands for in this call."""
    if len(found) != len(wanted):
        return False
    for number, size in zip(found, wanted, strict=True):
        if isinstance(size, str):
            if number < 1 or sizes.setdefault(size, number) != number:
                return False
        elif number != size:
            return False
    return True


def _as_type(array: Any, port: Mapping[str, Any]) -> Any:
    import numpy as np

    try:
        if array.dtype.kind not in "iufb":
            raise ValueError(f"values of type {array.dtype}, not numbers")
        with np.errstate(all="ignore"):
            found = array.astype(port["dtype"])
        if found.dtype.kind in "iub" and not np.array_equal(found, array):
            raise ValueError("a fraction, a missing value, or one out of range")
    except (TypeError, ValueError) as error:
        wanted = f"{shown(port['name'], 100)} has a value that is no {port['dtype']}"
        raise WrongInputError(f"input {wanted}: {error}") from error
    return found


def _first_line(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0], 200)


def predict(
    folder: Path, source: Path, target: Path | None, time_limit_s: float = TIME_LIMIT_S
) -> None:
    """Verify the files, then predict ``source`` into ``target``, or as CSV or JSON to stdout.

    What is outside of what validation data had is told on stderr, a line for each input and output.
    The model runs in a process of its own, for so many seconds at most. Raises RefusedBundleError
    or WrongInputError.
    """
    verify_files(folder)
    to = ["--to", str(target)] if target is not None else []
    sys.stdout.write(_in_child(["compute", str(folder), str(source), *to], time_limit_s))


def compute(folder: Path, source: Path, target: Path | None) -> None:
    """As ``predict``, in this process, without verifying the files."""
    manifest = read_manifest(folder)
    kind = source.suffix.lower()
    if kind not in INPUT_KINDS:
        raise WrongInputError(f"{source} is none of {', '.join(INPUT_KINDS)}")
    model = next((p for p in (MODEL, INT8_MODEL) if (folder / p).is_file()), None)
    if model is None and "onnx" not in manifest["formats"]:
        made = ", ".join(sorted(manifest["formats"]))
        raise WrongInputError(
            f"{folder} was exported without ONNX, which this program runs; it has {made}: load one "
            f"of them with PyTorch"
        )
    if model is None:
        raise WrongInputError(f"{folder} was pulled without an ONNX model; pull it with onnx")
    if target is not None and not target.parent.is_dir():
        raise WrongInputError(f"there is no folder {target.parent} to write {target.name} to")
    inputs = read_inputs(source, manifest)
    try:
        session = open_session(folder / model)
    except Exception as error:  # ONNX Runtime has classes of its own
        raise RefusedBundleError(f"{model} cannot be opened: {_first_line(error)}") from error
    outputs = run(session, manifest, inputs)
    for line in range_warnings(folder, manifest, inputs, outputs):
        print(f"{WARNING}{line}", file=sys.stderr)
    kind = target.suffix.lower() if target else (".json" if kind == ".json" else ".csv")
    if target is not None and kind not in INPUT_KINDS:
        raise WrongInputError(f"{target} is none of {', '.join(INPUT_KINDS)}")
    try:
        write_outputs(outputs, manifest, target, kind)
    except OSError as error:
        raise WrongInputError(f"{target or 'stdout'} cannot be written: {error}") from error


def range_warnings(
    folder: Path, manifest: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> list[str]:
    """A line for each input and output that is outside of what validation data had.

    None for a bundle that does not say what it had. Raises RefusedBundleError where what it says
    is no such thing.
    """
    if RANGES not in manifest["files"]:
        return []
    lines = []
    try:
        ranges = parse_json(read_plain(folder / RANGES))
        for kind, arrays in (("input", inputs), ("output", outputs)):
            for port in manifest["interface"][f"{kind}s"]:
                known = ranges[f"{kind}s"].get(port["name"])
                if known is not None:
                    array = arrays[port["name"]].astype(port["dtype"])
                    found = _outside(array, known)
                    lines += [f"{kind} {shown(port['name'], 100)}: {found}"] if found else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"{RANGES} does not describe this model: {shown(repr(error), 300)}"
        raise RefusedBundleError(message) from error
    return lines


def _outside(array: Any, known: Mapping[str, Any]) -> str:
    """What of an array validation data did not have, in words; empty where it had all of it."""
    import numpy as np

    low, high, outer = (
        np.array(known["low"], dtype=np.float64),
        np.array(known["high"], dtype=np.float64),
        np.array(known["quantiles"], dtype=np.float64)[:, [0, -1]],
    )
    table = array.reshape(-1, len(low)).astype(np.float64)
    is_finite = np.isfinite(table)
    slack = RANGE_SLACK * (high - low) if array.dtype.kind == "f" else 0.0
    distance = np.maximum(low - slack - table, table - high - slack)
    distance = np.where(is_finite & ~np.isnan(distance), distance, -1.0)
    is_out = distance > 0
    limits = outer + QUANTILE_SLACK * np.abs(outer) * np.array([-1.0, 1.0])
    is_beyond = is_finite & ((table < limits[:, 0]) | (table > limits[:, 1]))
    num_not_finite = int((~is_finite).sum())
    parts = []
    if is_out.any():
        row, column = divmod(int(np.argmax(distance)), len(low))
        samples = int(is_out.reshape(len(array), -1).any(1).sum())
        where = f" of column {column}" if len(low) > 1 else ""
        parts.append(
            f"{int(is_out.sum())} of {table.size} values, in {samples} of {len(array)} samples, "
            f"are outside of the range of validation data; the furthest is {table[row, column]:.6g}"
            f"{where}, which had {low[column]:.6g} to {high[column]:.6g}"
        )
    if is_beyond.sum() >= max(MIN_BEYOND, MAX_BEYOND * table.size):
        parts.append(
            f"{int(is_beyond.sum())} of {table.size} values are beyond the 0.1 % and 99.9 % "
            f"quantiles of validation data"
        )
    if num_not_finite and not known["num_not_finite"]:
        parts.append(f"{num_not_finite} of {table.size} values are not finite; none was there")
    return "; ".join(parts)


def read_inputs(source: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by input name.

    A CSV file has a header and one sample a row, all inputs side by side, each flattened; an empty
    cell is NaN. An NPY file holds the only input. A JSON file holds a list of samples, or an object
    of such lists.
    """
    import numpy as np

    ports = manifest["interface"]["inputs"]
    if not ports:
        raise WrongInputError("the model of this bundle takes no inputs")
    try:
        if source.suffix.lower() == ".json":
            value = parse_json(read_plain(source.resolve(), MAX_INPUT_BYTES))
            by_name = value if isinstance(value, dict) else {ports[0]["name"]: value}
            arrays = {name: np.asarray(rows) for name, rows in by_name.items()}
        elif source.suffix.lower() == ".npy":
            arrays = {ports[0]["name"]: _load_array(source.resolve())}
        else:
            arrays = _split_columns(_read_csv(np, source), ports)
    except (OSError, ValueError, ArithmeticError, RecursionError, MemoryError, csv.Error) as error:
        raise WrongInputError(f"{source} cannot be read: {_first_line(error)}") from error
    names = {port["name"] for port in ports}
    if set(arrays) != names:
        found = shown(f"{sorted(arrays)}; expected {sorted(names)}")
        raise WrongInputError(f"{source} has inputs {found}")
    return arrays


def write_outputs(
    outputs: Mapping[str, Any], manifest: Mapping[str, Any], target: Path | None, kind: str
) -> None:
    """Write outputs in the form of their suffix; NPY takes all outputs side by side."""
    import numpy as np

    flat = {name: array.reshape(len(array), -1) for name, array in outputs.items()}
    if kind == ".npy":
        assert target is not None
        np.save(target, np.concatenate(list(flat.values()), axis=1), allow_pickle=False)
        return
    stream = target.open("w", newline="") if target else sys.stdout
    try:
        if kind == ".json":
            plain = {name: _json_rows(array) for name, array in outputs.items()}
            json.dump(plain, stream)
            stream.write("\n")
        else:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([c for n, array in flat.items() for c in _columns(n, array, manifest)])
            writer.writerows(zip(*(c for a in flat.values() for c in a.T.tolist()), strict=True))
    finally:
        if target:
            stream.close()


def _columns(name: str, flat: Any, manifest: Mapping[str, Any]) -> list[str]:
    classes = manifest["interface"].get("class_names", {}).get(name)
    name, width = shown(name), flat.shape[1]
    if classes and len(classes) == width:
        return [f"{name}:{shown(label)}" for label in classes]
    return [name] if width == 1 else [f"{name}_{i}" for i in range(width)]


def _json_rows(array: Any) -> Any:
    """Nested lists; NaN, which JSON does not have, becomes null."""
    import numpy as np

    if np.issubdtype(array.dtype, np.floating):
        array = np.where(np.isfinite(array), array.astype(object), None)
    return array.tolist()


def _read_csv(np: Any, source: Path) -> Any:
    text = read_plain(source.resolve(), MAX_INPUT_BYTES).decode("utf-8-sig")
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    if len(rows) < 2:
        raise ValueError(f"expected a header and at least one row, found {len(rows)} rows")
    is_numbered = rows[0] == [str(number) for number in range(len(rows[0]))]
    if not is_numbered and all(_is_number(value) for value in rows[0]):
        raise ValueError("its first row holds numbers; expected a header with a name for each")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {number} has {len(row)} values, the header has {len(rows[0])}")
        for name, value in zip(rows[0], row, strict=True):
            if value and not _is_number(value):
                raise ValueError(f"row {number}, column {name}: {value!r} is no number")
    return np.array([[float(value or "nan") for value in row] for row in rows[1:]])


def _is_number(text: str) -> bool:
    try:
        return "_" not in text and float(text) is not None
    except ValueError:
        return False


def _split_columns(table: Any, ports: list[dict[str, Any]]) -> dict[str, Any]:
    shapes = _shapes(ports, table.shape[1])
    sizes = [math.prod(shape) for shape in shapes]
    if table.shape[1] != sum(sizes):
        raise ValueError(f"found {table.shape[1]} columns, the model takes {sum(sizes)}")
    arrays, start = {}, 0
    for port, shape, size in zip(ports, shapes, sizes, strict=True):
        arrays[port["name"]] = table[:, start : start + size].reshape(-1, *shape)
        start += size
    return arrays


def _shapes(ports: list[dict[str, Any]], num_columns: int) -> list[list[int]]:
    """The shapes of samples; one size that may vary follows from the number of columns."""
    names = {size for port in ports for size in port["shape"] if isinstance(size, str)}
    if not names:
        return [port["shape"] for port in ports]
    varying = [sum(isinstance(size, str) for size in port["shape"]) for port in ports]
    if len(names) > 1 or max(varying) > 1:
        raise ValueError(f"the sizes {', '.join(sorted(names))} vary, and a row of CSV is flat: "
                         "take JSON")  # fmt: skip
    products = [math.prod(n for n in port["shape"] if not isinstance(n, str)) for port in ports]
    fixed = sum(product for product, num in zip(products, varying, strict=True) if not num)
    size, rest = divmod(num_columns - fixed, max(1, sum(products) - fixed))
    if size < 1 or rest:
        raise ValueError(
            f"found {num_columns} columns, the model takes {f'{fixed} and ' if fixed else ''}a "
            f"multiple of {sum(products) - fixed}"
        )
    return [[size if isinstance(n, str) else n for n in port["shape"]] for port in ports]


def _load_array(path: Path) -> Any:
    """The array of an NPY file. Raises OSError or ValueError."""
    import numpy as np

    with open_plain(path) as stream:
        if stream.read(len(NPY_MAGIC)) != NPY_MAGIC:
            raise ValueError(f"{path.name} is no NPY file")
        stream.seek(0)
        try:
            return np.lib.format.read_array(stream, allow_pickle=False)
        except Exception as error:  # numpy parses the header as a piece of Python
            raise ValueError(f"{path.name} is no NPY file: {_first_line(error)}") from error


def _scaled_error(np: Any, found: Any, expected: Any) -> float:
    """``max|found - expected| / max|expected|``; infinite where NaN or shapes differ."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    found, expected = found.astype("float64"), expected.astype("float64")
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(found), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(expected[finite]).max())
    return float(np.abs(found - expected)[finite].max()) / (scale or 1.0)


def time_limit_s(text: str) -> float:
    """The seconds that an argument says. Raises ArgumentTypeError where they cannot be waited."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not MIN_TIME_LIMIT_S <= seconds <= MAX_TIME_LIMIT_S:
        raise argparse.ArgumentTypeError(
            f"{text[:30]!r} is no number from {MIN_TIME_LIMIT_S:g} to {MAX_TIME_LIMIT_S:.0f}"
        )
    return seconds


def main(arguments: list[str] | None = None) -> int:
    """Verify or predict; the exit code."""
    parser = argparse.ArgumentParser(description="Verify a bundle, or predict with it.")
    parser.set_defaults(command="verify", folder=Path(__file__).parent)
    commands = parser.add_subparsers()
    verifying = commands.add_parser("verify", help="check all files, then the golden samples")
    verifying.add_argument("folder", type=Path)
    predicting = commands.add_parser("predict", help="predict a CSV, NPY or JSON file")
    predicting.set_defaults(command="predict")
    predicting.add_argument("folder", type=Path)
    predicting.add_argument("input", type=Path)
    predicting.add_argument("--to", type=Path, metavar="FILE", help="write there, not to stdout")
    golden = commands.add_parser("golden", help="run the golden samples in this very process")
    golden.set_defaults(command="golden")
    golden.add_argument("folder", type=Path)
    computing = commands.add_parser("compute", help="predict in this very process")
    computing.set_defaults(command="compute")
    computing.add_argument("folder", type=Path)
    computing.add_argument("input", type=Path)
    computing.add_argument("--to", type=Path)
    parser.set_defaults(time_limit_s=TIME_LIMIT_S)
    for one in (parser, verifying, predicting, golden, computing):
        one.add_argument(
            "--time-limit-s",
            type=time_limit_s,
            default=argparse.SUPPRESS,
            metavar="SECONDS",
            help=f"end a model that runs longer; default: {TIME_LIMIT_S:g}",
        )
    options = parser.parse_args(arguments)
    try:
        _act(options)
    except ModuleNotFoundError as error:
        print(f"error: this needs {error.name}: pip install onnxruntime numpy", file=sys.stderr)
        return 1
    except (RefusedBundleError, WrongInputError, OSError) as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return 2 if isinstance(error, WrongInputError) else 1
    return 0


def _act(options: argparse.Namespace) -> None:
    if options.command == "predict":
        predict(options.folder, options.input, options.to, options.time_limit_s)
    elif options.command == "verify":
        print(proof(options.folder, options.time_limit_s))
    else:
        # Whoever started this process may be gone by then.
        timer = threading.Timer(options.time_limit_s, os._exit, (LATE_CODE,))
        timer.daemon = True
        timer.start()
        if options.command == "golden":
            print(verify_golden(options.folder))
        else:
            compute(options.folder, options.input, options.to)


if __name__ == "__main__":
    sys.exit(main())
