"""Bundles of strangers: verified or refused in one line, in time, and nothing else is changed."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from holdfast.training.bundles import consumer
from holdfast.training.bundles.pull import MARK, pull
from holdfast.training.bundles.sources import FolderSource
from holdfast.training.errors import BundleError, HoldfastError, InputError
from holdfast.training.runs.shown_text import shown
from tests.safety.hostile import (
    ESCAPES,
    ODD_VALUES,
    SPECIAL,
    changed,
    digest_of_tree,
    nested,
    put_special,
    within,
)

LIMIT_S = 10.0
GOLDEN: dict[str, Any] = {
    "cases": [{"name": "one", "tolerances": {"y": 1e-6}}],
    "int8_tolerance": 0.1,
}


def onnx_bytes(endless: bool = False) -> bytes:
    """``y = 2 x``, at once or never."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    if endless:
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["go"], ["go_on"]),
                helper.make_node("Identity", ["v"], ["w"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("i", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("v", TensorProto.FLOAT, ["n", 2]),
            ],
            [
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("w", TensorProto.FLOAT, ["n", 2]),
            ],
        )
        always = helper.make_tensor("t", TensorProto.BOOL, [], [True])
        nodes = [
            helper.make_node("Constant", [], ["always"], value=always),
            helper.make_node("Loop", ["", "always", "x"], ["y"], body=body),
        ]
    graph = helper.make_graph(nodes, "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


X = np.arange(6, dtype=np.float32).reshape(3, 2)
FILES = {
    "1/model.onnx": onnx_bytes(),
    "README.md": b"# card\n",
    "golden/golden.json": json.dumps(GOLDEN).encode(),
    "golden/one.input.x.npy": npy(X),
    "golden/one.output.y.npy": npy(2 * X),
}
FACTS: dict[str, Any] = {
    "champion": {"name": "last", "test_metrics": {"loss": 0.25, "odd": None}},
    "format_version": consumer.FORMAT_VERSION,
    "formats": {"onnx": {"path": "1/model.onnx"}},
    "interface": {
        "class_names": {"y": ["zero", "one"]},
        "inputs": [{"name": "x", "dtype": "float32", "shape": [2]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [2]}],
    },
    "name": "digits",
    "run": {"experiment": "digits", "run_id": "first"},
}


def write_bundle(folder: Path, files: dict[str, bytes] = FILES, **facts: Any) -> Path:
    described = {}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        described[name] = {"sha256": consumer.file_digest(path), "size_bytes": len(content)}
    write_manifest(folder, {**FACTS, "files": described, **facts})
    return folder


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    manifest = {**manifest, "manifest_digest": consumer.manifest_digest(manifest)}
    (folder / "manifest.json").write_bytes(consumer.canonical_bytes(manifest))


def with_file(name: str, content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_bundle(folder, {**FILES, name: content})

    return make


def with_facts(**facts: Any) -> Callable[[Path], None]:
    return lambda folder: write_bundle(folder, **facts) and None


def with_special(name: str, kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_bundle(folder)
        put_special(folder / name, kind, folder.parent / "precious")

    return make


def deep_folders(folder: Path) -> None:
    write_bundle(folder)
    place = folder
    for _ in range(400):
        place = place / "d"
    place.mkdir(parents=True)


def odd_facts(num: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    rng = random.Random(11)
    while num:
        odd = rng.choice(ODD_VALUES)
        facts = json.loads(changed(rng, FACTS, odd))
        try:
            consumer.canonical_bytes(facts)
        except ValueError:
            continue  # half a character can be in no manifest
        num -= 1
        yield f"facts {num}: {odd!r:.20}", with_facts(**facts)


def odd_golden(num: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    rng = random.Random(12)
    for number in range(num):
        odd = rng.choice(ODD_VALUES)
        content = changed(rng, GOLDEN, odd)
        yield f"golden {number}: {odd!r:.20}", with_file("golden/golden.json", content)


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }"


def npy_with_header(header: bytes) -> bytes:
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + bytes(24)


CASES: dict[str, Callable[[Path], None]] = {
    **{
        f"{name} is {kind}": with_special(name, kind)
        for name in ("manifest.json", "1/model.onnx", "golden/golden.json", "pulled.json")
        for kind in SPECIAL
    },
    **dict(odd_facts(60)),
    **dict(odd_golden(20)),
    "deep folders": deep_folders,
    "deep golden": with_file("golden/golden.json", b"[" * 10**5),
    "deep facts": with_facts(measured=nested(1, 150)),
    "no onnx": with_file("1/model.onnx", b"onnx" * 99),
    "empty onnx": with_file("1/model.onnx", b""),
    "pickle for npy": with_file("golden/one.input.x.npy", npy(np.array([print], dtype=object))),
    "zip for npy": with_file("golden/one.input.x.npy", b"PK\x03\x04" + bytes(99)),
    "deep npy": with_file(
        "golden/one.input.x.npy",
        npy_with_header(HEADER.replace(b"(3, 2)", b"(" * 3000 + b")" * 3000)),
    ),
    "huge npy": with_file(
        "golden/one.input.x.npy", npy_with_header(HEADER.replace(b"3", b"9" * 15))
    ),
    "other shape": with_file("golden/one.output.y.npy", npy(np.zeros((3, 3), np.float32))),
    "wrong numbers": with_file("golden/one.output.y.npy", npy(3 * X)),
    "escapes in its name": with_facts(name=f"x: all files are right {ESCAPES}"),
    "verdict for a name": with_facts(name="x: all files and 9 golden outputs are right"),
    "long name": with_facts(name="x" * 10**5),
}


def judged(folder: Path) -> str:
    """The verdict, or why it was refused, in the words that are printed."""
    try:
        consumer.verify_files(folder)
        return f"good: {consumer.verify_golden(folder)}"
    except consumer.RefusedBundleError as error:
        return str(error)


def test_whatever_a_bundle_holds_there_is_one_verdict(tmp_path: Path) -> None:
    assert len(CASES) >= 80
    (tmp_path / "precious").write_text("mine")
    good = write_bundle(tmp_path / "good")
    assert judged(good) == "good: 1"
    num_good = 0
    for number, (what, make) in enumerate(CASES.items()):
        folder = tmp_path / f"case-{number}" / "bundle"
        folder.mkdir(parents=True)
        make(folder)
        try:
            with within(LIMIT_S):
                verdict = judged(folder)
                told = pulled(folder, folder.parent / "there")
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        assert verdict.isprintable(), what
        assert shown(told) == told, what
        num_good += verdict.startswith("good")
    assert num_good < len(CASES) / 3  # an odd value may be in a place that nothing looks at
    assert (tmp_path / "precious").read_text() == "mine"


def pulled(folder: Path, target: Path) -> str:
    try:
        return str(pull(FolderSource(folder), target)["name"])
    except HoldfastError as error:
        return str(error)


def test_a_model_that_never_ends_is_ended(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", {**FILES, "1/model.onnx": onnx_bytes(endless=True)})
    onnx.checker.check_model(onnx.load(folder / "1/model.onnx"))
    with within(60.0):
        with pytest.raises(consumer.RefusedBundleError, match="still running after 3 s"):
            consumer.proof(folder, time_limit_s=3.0)
        samples = tmp_path / "samples.npy"
        samples.write_bytes(npy(X))
        with pytest.raises(consumer.RefusedBundleError, match="still running after 3 s"):
            consumer.predict(folder, samples, None, time_limit_s=3.0)


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1", "1e300", "soon"])
def test_a_time_limit_that_cannot_be_waited_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_bundle(tmp_path / "b")
    with pytest.raises(SystemExit, match="2"):
        consumer.main(["verify", str(folder), f"--time-limit-s={text}"])
    assert f"'{text}' is no number from 0.1 to 2592000" in capsys.readouterr().err


def test_a_good_bundle_is_proved_and_predicts_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_bundle(tmp_path / "b")
    assert consumer.main(["verify", str(folder)]) == 0
    assert "all files and 1 golden outputs are right" in capsys.readouterr().out
    samples = tmp_path / "samples.csv"
    samples.write_text("a,b\n1,2\n")
    assert consumer.main(["predict", str(folder), str(samples)]) == 0
    assert capsys.readouterr().out == "y:zero,y:one\n2.0,4.0\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("long.csv", b"a,b\n" + b"1" * 200_000 + b",2\n"),
        ("nul.csv", b"a,b\n1,\0\n"),
        ("latin.csv", b"a,b\n\xff,2\n"),
        ("deep.json", b"[" * 10**5),
        ("deeper.json", b"[" * 70 + b"1" + b"]" * 70),
        ("object.json", b'{"x": {"y": 1}}'),
        ("ragged.json", b"[[1, 2], [3]]"),
        ("digits.json", b"[[" + b"9" * 5000 + b", 1]]"),
        ("none.json", b"null"),
        ("deep.npy", npy_with_header(HEADER.replace(b"(3, 2)", b"(" * 3000 + b")" * 3000))),
        ("huge.npy", npy_with_header(HEADER.replace(b"3", b"9" * 15))),
        ("cut.npy", npy(X)[:-5]),
        ("header.npy", b"\x93NUMPY"),
        ("zip.npy", b"PK\x03\x04" + bytes(99)),
        ("words.npy", npy(np.array([["a", "b"]]))),
    ],
)
def test_samples_that_are_none_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes
) -> None:
    folder = write_bundle(tmp_path / "b")
    (tmp_path / name).write_bytes(content)
    with within(LIMIT_S), pytest.raises(consumer.WrongInputError) as caught:
        consumer.compute(folder, tmp_path / name, None)
    assert str(caught.value).isprintable()


def test_a_pull_never_leaves_its_own_folder(tmp_path: Path) -> None:
    source = FolderSource(write_bundle(tmp_path / "source"))
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (elsewhere / "inner/precious").write_text("mine")
    (elsewhere / "README.md").write_text("mine, too")
    outside = digest_of_tree(elsewhere)
    partial = tmp_path / "there.partial"

    partial.symlink_to(elsewhere)
    with pytest.raises(InputError, match="is not what holdfast pull leaves"):
        pull(source, tmp_path / "there")
    partial.unlink()
    for theirs in ("README.md", "notes.txt", "1"):
        partial.mkdir()
        (partial / theirs).write_text("theirs")
        with pytest.raises(InputError, match="nothing in it is touched"):
            pull(source, tmp_path / "there")
        assert (partial / theirs).read_text() == "theirs"
        (partial / theirs).unlink()
        partial.rmdir()

    partial.mkdir()
    (partial / MARK).touch()
    (partial / "bundle").symlink_to(elsewhere)  # within a pull's own folder
    pull(source, tmp_path / "there")
    assert digest_of_tree(elsewhere) == outside
    assert not partial.exists()


@pytest.mark.parametrize("place", ["golden", "golden/golden.json", "README.md", "1/model.onnx"])
@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_a_half_pull_in_which_somebody_put_links_changes_nothing_else(
    tmp_path: Path, place: str, kind: str
) -> None:
    source = FolderSource(write_bundle(tmp_path / "source"))
    precious = tmp_path / "precious"
    precious.write_text("mine")
    content = tmp_path / "there.partial/bundle"
    (content / place).parent.mkdir(parents=True)
    (tmp_path / "there.partial" / MARK).touch()
    if kind == "link":
        (content / place).symlink_to(precious)
    else:
        os.link(precious, content / place)
    pull(source, tmp_path / "there")
    assert precious.read_text() == "mine"
    consumer.verify_files(tmp_path / "there")


@pytest.mark.parametrize("target", [".", "..", "/", "x\0y", "x" * 300])
def test_a_target_that_can_be_no_new_folder_is_said(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(write_bundle(tmp_path / "source"))
    monkeypatch.chdir(tmp_path)
    before = digest_of_tree(tmp_path)
    with pytest.raises((HoldfastError,)) as caught:
        pull(source, Path(target))
    assert "\n" not in str(caught.value)
    assert digest_of_tree(tmp_path) == before


def test_a_bundle_of_another_name_is_not_taken(tmp_path: Path) -> None:
    source = FolderSource(write_bundle(tmp_path / "source", name="other"))
    with pytest.raises(BundleError, match="of the name 'other', not 'digits'"):
        pull(source, tmp_path / "there", name="digits")
    assert not (tmp_path / "there").exists()


def test_the_consumer_shows_text_as_all_else_does() -> None:
    rng = random.Random(5)
    for _ in range(500):
        text = "".join(chr(rng.randrange(0x11_0000)) for _ in range(rng.randrange(40)))
        assert consumer.shown(text) == shown(text)
        assert shown(text).isprintable()
        assert len(shown(text, 5)) <= 10 * 5 + 1
