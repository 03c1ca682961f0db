"""From a chosen champion to a verified bundle, in the stage's own process and its children."""

from __future__ import annotations

import io
import json
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from holdfast.training.bundles import consumer
from holdfast.training.bundles.promotion import run_promotion
from holdfast.training.bundles.pull import pull
from holdfast.training.bundles.registry import Registry
from holdfast.training.bundles.sources import FolderSource
from holdfast.training.bundles.stage import run_export
from holdfast.training.errors import ExportError, ParityError
from holdfast.training.stage import prepared_stage
from holdfast.training.weights.reading import read_weights
from tests.documentation.pages import REPOSITORY, field_tables, file_tables
from tests.training.bundles.small_bundle import files_of, make_bundle
from tests.training.bundles.whole_export import arguments, choose, export


@pytest.fixture(scope="module")
def two_bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same champion, exported twice, in two stores and by two processes."""
    return export(tmp_path_factory.mktemp("one")), export(tmp_path_factory.mktemp("two"))


@pytest.fixture
def bundle(two_bundles: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(two_bundles[0], tmp_path / "bundle"))


def test_the_page_of_formats_names_all_that_a_bundle_holds(
    two_bundles: tuple[Path, Path],
) -> None:
    page = REPOSITORY / "docs" / "formats.md"
    tables, named = field_tables(page), file_tables(page)["bundle"]
    patterns = [re.sub("<[^>]*>", "[^/]+", re.escape(name)) for name in named]
    found = files_of(two_bundles[0])
    assert [name for name in found if not any(re.fullmatch(p, name) for p in patterns)] == []
    manifest, parity, golden = (
        json.loads(found[name]) for name in ("manifest.json", "parity.json", "golden/golden.json")
    )
    assert sorted(tables["bundle manifest"]) == sorted(manifest)
    assert sorted(tables["measured"]) == sorted(manifest["measured"])
    assert all(sorted(tables["parity row"]) == sorted(row) for row in parity["artifacts"])
    assert sorted(tables["golden"]) == sorted(golden)
    ranges = json.loads(found["ranges.json"])
    assert sorted(tables["ranges"]) == sorted(ranges)
    for port in [*ranges["inputs"].values(), *ranges["outputs"].values()]:
        assert sorted(tables["ranges of a port"]) == sorted(port)


def test_the_bundle_serves_every_consumer(two_bundles: tuple[Path, Path]) -> None:
    names = set(files_of(two_bundles[0]))
    assert {
        "1/MLmodel",
        "1/model.onnx",
        "README.md",
        "config.pbtxt",
        "exported_program/model.pt2",
        "golden/golden.json",
        "manifest.json",
        "model.safetensors",
        "onnx_int8/model.onnx",
        "parity.json",
        "ranges.json",
        "torchscript/model.pt",
        "verify.py",
    } <= names


def test_the_same_champion_gives_the_same_bytes(two_bundles: tuple[Path, Path]) -> None:
    one, two = map(files_of, two_bundles)
    assert set(one) == set(two)
    assert [name for name in one if one[name] != two[name]] == ["manifest.json"]
    manifests = [json.loads(files["manifest.json"]) for files in (one, two)]
    different = [key for key in manifests[0] if manifests[0][key] != manifests[1][key]]
    assert sorted(different) == ["manifest_digest", "measured"]


def test_no_file_names_this_machine(two_bundles: tuple[Path, Path]) -> None:
    repository = str(Path(__file__).parents[3]).encode()
    for folder in two_bundles:
        needles = (repository, str(folder.parents[2]).encode(), b"site-packages")
        for name, content in unpacked(files_of(folder)).items():
            assert not [needle for needle in needles if needle in content], name


def unpacked(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files, and what stands within those that are archives, which may be compressed."""
    found = dict(files)
    for name, content in files.items():
        if content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for entry in archive.namelist():
                    found[f"{name}!{entry}"] = archive.read(entry)
    assert any("!model/code/" in name for name in found)
    return found


def test_another_training_can_begin_with_its_weights(two_bundles: tuple[Path, Path]) -> None:
    found, expected = read_weights(two_bundles[0]), load_file(two_bundles[0] / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_every_file_is_readable_by_others(two_bundles: tuple[Path, Path]) -> None:
    for path in two_bundles[0].rglob("*"):
        wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
        assert path.stat().st_mode & wanted == wanted, path


def test_the_manifest_tells_where_the_bundle_comes_from(two_bundles: tuple[Path, Path]) -> None:
    manifest = consumer.verify_files(two_bundles[0])
    assert manifest["run"]["run_id"] == "first"
    assert set(manifest["champion"]["test_metrics"]) == {"loss", "correct"}
    assert manifest["interface"]["class_names"] == {"logits": ["low", "high", "other"]}
    assert set(manifest["measured"]["latency"]["onnx"]) == {"batch-1", "batch-64"}
    assert {"torch", "onnx", "onnxruntime"} <= set(manifest["versions"])


def test_a_finished_bundle_is_left_alone(two_bundles: tuple[Path, Path]) -> None:
    folder = two_bundles[0]
    before = (folder / "manifest.json").stat().st_mtime_ns
    with prepared_stage(arguments(folder.parents[2])) as stage:
        assert run_export(stage).outcome == "completed"
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_a_run_that_is_resumed_does_not_take_an_alias_back(
    two_bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(two_bundles[0].parents[2], tmp_path / "store"))
    registry = Registry(store)
    with prepared_stage(arguments(store)) as stage:
        run_promotion(stage)
        name = json.loads(stage.run.promotion_json.read_text())["name"]
        other = make_bundle(tmp_path / "other")
        manifest = {**consumer.read_manifest(other), "name": name}
        manifest["manifest_digest"] = consumer.manifest_digest(manifest)
        (other / "manifest.json").write_bytes(consumer.canonical_bytes(manifest))
        assert registry.publish(other) == (name, 2)
        registry.point_alias(name, "champion", 2, "by hand")
    with prepared_stage(arguments(store)) as stage:
        assert run_promotion(stage).outcome == "completed"
    assert registry.aliases(name) == {"champion": 2}
    assert [move.version for move in registry.history(name, "champion")] == [1, 2]

    again = replace(arguments(store), should_decide_again=True)
    decided = again.run.promotion_json.read_bytes()
    with prepared_stage(again) as stage, pytest.raises(ExportError, match="cannot be opened"):
        run_promotion(stage)  # against a holder that serves nothing
    assert again.run.promotion_json.read_bytes() == decided, "lost with the new decision"
    registry.point_alias(name, "champion", 1, "by hand, back")
    with prepared_stage(again) as stage:
        run_promotion(stage)
    assert json.loads(stage.run.promotion_json.read_text())["reason"] == (
        "held already: by hand, back"
    )


def test_an_altered_champion_is_not_exported(tmp_path: Path) -> None:
    with prepared_stage(arguments(tmp_path)) as stage:
        path = choose(stage)
        tensors = load_file(path)
        tensors["amount.bias"] += 1
        save_file(tensors, path)
        with pytest.raises(ExportError, match=r"was altered after it was chosen"):
            run_export(stage)


def test_a_run_without_a_champion_says_what_to_do(tmp_path: Path) -> None:
    with (
        prepared_stage(arguments(tmp_path)) as stage,
        pytest.raises(ExportError, match=r"choose a champion first"),
    ):
        run_export(stage)


@pytest.mark.slow
def test_a_failed_gate_publishes_nothing_and_names_the_figure(tmp_path: Path) -> None:
    with prepared_stage(arguments(tmp_path, "export.int8_max_metric_change=1e-9")) as stage:
        choose(stage)
        with pytest.raises(ParityError, match=r"onnx_int8: task: loss: changes from 1\.\d+ to"):
            run_export(stage)
        assert not stage.run.bundle.exists()


def run_alone(bundle: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The bundle's own program in a process that cannot import torch or this project."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch','training','click','onnx']));"
    code = f"{blocked} sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0], "
    return subprocess.run(
        [sys.executable, "-c", f"{code}run_name='__main__')", str(bundle / "verify.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=bundle.parent,
    )


def test_a_consumer_verifies_with_onnxruntime_and_numpy_alone(bundle: Path) -> None:
    done = run_alone(bundle)
    assert done.returncode == 0, done.stderr
    assert "8 golden outputs are right" in done.stdout


@pytest.mark.parametrize("kind", [".csv", ".npy", ".json"])
def test_predicts_every_kind_of_file(bundle: Path, tmp_path: Path, kind: str) -> None:
    images = np.load(bundle / "golden/ordinary.input.images.npy")
    wanted = np.load(bundle / "golden/ordinary.output.logits.npy")
    source, target = tmp_path / f"in{kind}", tmp_path / f"out{kind}"
    if kind == ".npy":
        np.save(source, images)
    elif kind == ".json":
        source.write_text(json.dumps(images.tolist()))
    else:
        np.savetxt(source, images.reshape(len(images), -1), delimiter=",", header="x" + ",x" * 35)
    done = run_alone(bundle, "predict", str(bundle), str(source), "--to", str(target))
    assert done.returncode == 0, done.stderr
    if kind == ".csv":
        lines = target.read_text().splitlines()
        assert lines[0] == "logits:low,logits:high,logits:other,amount"
        found = np.loadtxt(lines[1:], delimiter=",")[:, :3]
    elif kind == ".json":
        found = np.array(json.loads(target.read_text())["logits"])
    else:
        found = np.load(target)[:, :3]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_predictions_are_warned_of_outside_of_the_ranges_of_validation_data(
    bundle: Path, tmp_path: Path
) -> None:
    ranges = json.loads((bundle / "ranges.json").read_text())
    assert "ranges.json" in json.loads((bundle / "manifest.json").read_text())["files"]
    assert list(ranges["inputs"]) == ["images"]
    assert list(ranges["outputs"]) == ["amount", "logits"]
    images = np.load(bundle / "golden/ordinary.input.images.npy")
    source = tmp_path / "in.npy"
    np.save(source, images)
    done = run_alone(bundle, "predict", str(bundle), str(source))
    assert (done.returncode, done.stderr) == (0, ""), "golden samples are validation samples"
    images[2] += 1e4
    np.save(source, images)
    done = run_alone(bundle, "predict", str(bundle), str(source))
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert lines[0].startswith(
        f"warning: input images: 36 of {images.size} values, in 1 of {len(images)} samples, are "
        "outside of the range of validation data"
    )
    assert [line.partition(":")[2].split(":")[0] for line in lines[1:]] == [
        " output logits",
        " output amount",
    ]


@pytest.mark.slow
def test_a_bundle_that_its_own_verify_would_refuse_is_not_published(tmp_path: Path) -> None:
    formats = 'export.formats=["onnx_int8"]'
    with prepared_stage(arguments(tmp_path, formats)) as stage:
        choose(stage, is_fit_for_int8=False)
        with pytest.raises(ParityError, match=r"tolerance 0.25; leave onnx_int8 out of export"):
            run_export(stage)
        assert not stage.run.bundle.exists()


def test_a_wrong_input_says_what_is_expected(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("a,b\n1,2\n")
    done = run_alone(bundle, "predict", str(bundle), str(source))
    assert done.returncode == 2
    assert "found 2 columns, the model takes 36" in done.stderr


WRONG_INPUTS: dict[str, tuple[str, bytes, str]] = {
    "text in a cell": (".csv", b"x" + b",x" * 35 + b"\n" + b"cat" + b",1" * 35, r"row 2, column x"),
    "underscores": (".csv", b"x" + b",x" * 35 + b"\n" + b"1_0" + b",1" * 35, r"'1_0' is no number"),
    "no header": (".csv", b"0.5" + b",1" * 35 + b"\n1" + b",1" * 35, "expected a header"),
    "empty CSV": (".csv", b"", "expected a header and at least one row"),
    "empty NPY": (".npy", b"", "cannot be read"),
    "text": (".json", b'["a", "b"]', r"shape \[2\]"),
    "deep": (".json", b"[" * 100_000, "cannot be read"),
    "huge": (".json", b"[[[[" + b"1" * 400 + b"]]]]", "."),
    "other kind": (".txt", b"", r"none of \.csv"),
}


@pytest.mark.parametrize("case", list(WRONG_INPUTS))
def test_each_wrong_input_is_one_line_and_exit_code_2(
    two_bundles: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    suffix, content, message = WRONG_INPUTS[case]
    source = tmp_path / f"in{suffix}"
    source.write_bytes(content)
    done = run_alone(two_bundles[0], "predict", str(two_bundles[0]), str(source))
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_predictions_are_not_written_to_a_folder_that_is_not_there(
    two_bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    source = two_bundles[0] / "golden/ordinary.input.images.npy"
    words = (str(two_bundles[0]), str(source), "--to", str(tmp_path / "nowhere/out.json"))
    done = run_alone(two_bundles[0], "predict", *words)
    assert done.returncode == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in done.stderr


def test_a_partial_pull_is_proved_as_far_as_it_goes(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    pull(FolderSource(bundle), target, ("weights",))
    assert not (target / "1").exists(), "what describes the model that is not there"
    done = run_alone(target)
    assert done.returncode == 0, done.stderr
    assert "no ONNX model was pulled, none was run" in done.stdout
    words = ("predict", str(target), str(target / "golden/ordinary.input.images.npy"))
    done = run_alone(target, *words)
    assert done.returncode == 2
    assert "was pulled without an ONNX model" in done.stderr

    small = tmp_path / "small"
    pull(FolderSource(bundle), small, ("onnx_int8",))
    done = run_alone(small, "predict", str(small), *words[2:])
    assert done.returncode == 0, done.stderr


def test_what_no_export_writes_is_refused_though_its_digests_are_right(bundle: Path) -> None:
    manifest = {**consumer.read_manifest(bundle), "interface": None}
    manifest["manifest_digest"] = consumer.manifest_digest(manifest)
    (bundle / "manifest.json").write_bytes(consumer.canonical_bytes(manifest))
    with pytest.raises(consumer.RefusedBundleError, match="does not describe a bundle"):
        consumer.verify_files(bundle)


def spoiled(bundle: Path) -> Iterator[tuple[str, Any]]:
    """Every way in which a bundle is spoiled, with what the refusal must name."""
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            yield path.relative_to(bundle).as_posix(), path


def test_one_altered_byte_anywhere_is_refused_by_name(bundle: Path) -> None:
    for name, path in spoiled(bundle):
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(consumer.RefusedBundleError, match=name):
                consumer.verify_files(bundle)
        path.write_bytes(content)
    consumer.verify_files(bundle)


def test_a_truncated_or_missing_file_is_refused_by_name(bundle: Path) -> None:
    for name, path in spoiled(bundle):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(consumer.RefusedBundleError, match=name):
            consumer.verify_files(bundle)
        path.unlink()
        with pytest.raises(consumer.RefusedBundleError, match=f"{name} is missing"):
            consumer.verify_files(bundle)
        path.write_bytes(content)


def test_added_files_and_links_are_refused_by_name(bundle: Path) -> None:
    (bundle / "extra.txt").write_text("hello")
    with pytest.raises(consumer.RefusedBundleError, match=r"extra\.txt is not in the manifest"):
        consumer.verify_files(bundle)
    (bundle / "extra.txt").unlink()
    (bundle / "link").symlink_to("/etc/passwd")
    with pytest.raises(consumer.RefusedBundleError, match="link is a symlink"):
        consumer.verify_files(bundle)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../b", "a\\b", "", "C:evil"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "size_bytes": 1}
    manifest["manifest_digest"] = consumer.manifest_digest(manifest)
    (bundle / "manifest.json").write_bytes(consumer.canonical_bytes(manifest))
    with pytest.raises(consumer.RefusedBundleError, match="is not a path in the bundle"):
        consumer.verify_files(bundle)


def test_wrong_numbers_on_this_machine_are_refused(bundle: Path) -> None:
    path = bundle / "golden/ordinary.output.amount.npy"
    np.save(path, np.load(path) * 1.001)
    with pytest.raises(consumer.RefusedBundleError, match="case ordinary, output amount"):
        consumer.verify_golden(bundle)


def test_tritons_own_definition_parses_the_configuration(bundle: Path) -> None:
    reason = "Triton's definition of config.pbtxt is in tritonclient[grpc]"
    pytest.importorskip("tritonclient", reason=reason)
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason=reason)
    from google.protobuf import text_format

    config = text_format.Parse((bundle / "config.pbtxt").read_text(), model_config.ModelConfig())
    assert config.backend == "onnxruntime"
    (port,) = config.input
    assert (port.name, list(port.dims)) == ("images", [1, 6, 6])
    assert [(port.name, list(port.dims)) for port in config.output] == [
        ("logits", [3]),
        ("amount", [1]),
    ]


@pytest.mark.filterwarnings("ignore")
def test_mlflows_pyfunc_loads_the_version_folder(bundle: Path) -> None:
    pytest.importorskip("pandas", reason="mlflow's pyfunc needs pandas")
    pyfunc = pytest.importorskip("mlflow.pyfunc")
    images = np.load(bundle / "golden/ordinary.input.images.npy")
    found = pyfunc.load_model(str(bundle / "1")).predict({"images": images})
    wanted = np.load(bundle / "golden/ordinary.output.logits.npy")
    np.testing.assert_allclose(found["logits"], wanted, rtol=1e-4)
