"""A model that is served as several graphs: translation, as encoder and decoder step."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from holdfast.training.bundles import consumer
from holdfast.training.bundles.stage import run_export
from holdfast.training.bundles.summary import artifact_rows
from holdfast.training.configuration.schema import ExportConfig
from holdfast.training.data.loader import evaluation_batches
from holdfast.training.experiment.protocol import Context
from holdfast.training.experiments.digits import Digits, DigitsSettings
from holdfast.training.experiments.translation.experiment import Translation, TranslationSettings
from holdfast.training.experiments.translation.model import TranslationModel
from holdfast.training.experiments.translation.search import greedy
from holdfast.training.export import parts
from holdfast.training.export.parts import PartExperiment, eager_runs, part_names, write_parts
from holdfast.training.export.specification import Inputs
from holdfast.training.parity.assembly import PartChecks, check_names
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.stage import StageArguments, prepared_stage

SETTINGS = {"num_generated": 300, "width": 16, "num_heads": 2, "feedforward": 16, "max_tokens": 18}
DOCUMENT = Path(__file__).parents[3] / "docs/translation.md"
OVERRIDES = (
    *(f"experiment.{name}={value}" for name, value in SETTINGS.items()),
    'export.formats=["onnx"]',
    "export.num_latency_runs=10",
)


def translation() -> Translation:
    return Translation(Context(TranslationSettings(**SETTINGS)))


@cache
def trained_model(seed: int) -> TranslationModel:
    """Trained for so short a time that it says much, and much that is wrong."""
    torch.manual_seed(seed)
    experiment = translation()
    model, dataset = experiment.model(), experiment.dataset("train")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        loss = experiment.loss(model, dataset.fetch(range(step * 32 % 192, step * 32 % 192 + 32)))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("champion") / "model.safetensors"
    save_file(trained_model(1).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def bundle(champion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    arguments = StageArguments(
        experiment="translation",
        store=store,
        run_id="first",
        num_threads=1,
        overrides=OVERRIDES,
        progress_format="none",
    )
    with prepared_stage(arguments) as stage:
        path = stage.run.candidates / "best/model.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(champion.read_bytes())
        entry = {"digest": consumer.file_digest(path), "metrics": {}, "name": "best"}
        row = {**entry, "path": "candidates/best/model.safetensors"}
        write_json_durably(stage.run.evaluation_json, {"champion": row})
        assert run_export(stage).outcome == "completed"
        return stage.run.bundle


@pytest.mark.slow
def test_the_bundle_has_every_part_and_the_proof_that_they_translate_alike(bundle: Path) -> None:
    manifest = consumer.verify_files(bundle)
    assert {
        "parts/decoder_step/1/model.onnx",
        "parts/decoder_step/config.pbtxt",
        "parts/decoder_step/golden/golden.json",
        "parts/encoder/1/model.onnx",
        "tokenizer.json",
    } <= set(manifest["files"])
    details = json.loads((bundle / "parity.json").read_text())["details"]
    assert set(details) == {"champion", "weights", "onnx", *check_names(translation(), ("onnx",))}
    assert all(report["is_good"] for report in details.values())
    assert details["decoder_step.onnx"]["num_tensors"] > 15
    for name in ("onnx", "encoder.onnx"):
        assert {"shortest", "longest"} <= set(details[name]["numbers"])
    assert set(details["together.onnx"]["metrics"]) == {"bleu"}
    assert "nrefs:var|" in manifest["description"]


@pytest.mark.slow
def test_every_part_has_its_row_of_parity_its_latency_and_its_line_in_the_model_card(
    bundle: Path,
) -> None:
    rows = {row["format"]: row for row in artifact_rows(bundle)}
    assert set(rows) == {"weights", "onnx", "encoder.onnx", "decoder_step.onnx"}
    for row in rows.values():
        assert row["is_passed"]
        assert row["size_bytes"] == (bundle / row["name"]).stat().st_size
        assert set(row["latency"]) == {"batch-1", "batch-64"}
        assert row["latency"]["batch-1"]["p50_ms"] > 0
        assert f"| `{row['name']}`" in (bundle / "README.md").read_text()


@pytest.mark.slow
def test_golden_samples_prove_each_part_on_the_consumers_machine(
    bundle: Path, tmp_path: Path
) -> None:
    manifest = consumer.read_manifest(bundle)
    outputs = [graph["interface"]["outputs"] for _, graph in consumer.graphs(manifest)]
    num_cases = [
        len(json.loads((bundle / prefix / "golden/golden.json").read_text())["cases"])
        for prefix, _ in consumer.graphs(manifest)
    ]
    expected = sum(len(ports) * num for ports, num in zip(outputs, num_cases, strict=True))
    assert consumer.verify_golden(bundle) == expected

    copy = shutil.copytree(bundle, tmp_path / "copy")
    path = copy / "parts/decoder_step/golden/ordinary.output.logits.npy"
    np.save(path, np.load(path) * np.float32(1.01))
    with pytest.raises(consumer.RefusedBundleError, match=r"decoder_step/1/model\.onnx .*logits"):
        consumer.verify_golden(copy)


@pytest.mark.slow
def test_a_part_that_would_be_read_from_elsewhere_is_refused(bundle: Path) -> None:
    manifest = consumer.read_manifest(bundle)
    manifest["parts"] = {"../../elsewhere": manifest["parts"]["encoder"]}
    manifest["manifest_digest"] = consumer.manifest_digest(manifest)
    with pytest.raises(consumer.RefusedBundleError, match="is not a path in the bundle"):
        consumer.parse_manifest(consumer.canonical_bytes(manifest))


@pytest.mark.slow
def test_a_partial_pull_leaves_out_the_other_formats_of_parts(bundle: Path) -> None:
    wanted = consumer.chosen_files(consumer.read_manifest(bundle), ["weights"])
    assert not [name for name in wanted if name.endswith(".onnx")]
    assert "tokenizer.json" in wanted


@pytest.mark.slow
def test_the_documented_program_translates_as_pytorch_does(bundle: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    found, model = translation(), trained_model(1)
    (source, _), (numbers, _) = found.dataset("test").fetch(range(20))
    with torch.no_grad():
        wanted = found.vocabulary.decode(greedy(model, source, 18).tolist())
    assert len(set(wanted)) > 5
    lines = [found._sentences[number].source for number in numbers.tolist()]
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
        cwd=bundle,
    )
    assert done.stdout.split("\n")[:-1] == wanted


@pytest.mark.slow
def test_parts_with_other_weights_are_refused(champion: Path, tmp_path: Path) -> None:
    stale = tmp_path / "stale.safetensors"
    save_file(trained_model(2).state_dict(), stale)
    folders = tmp_path / "bundle", tmp_path / "scratch"
    assert write_parts(translation(), stale, ExportConfig(), folders, ("onnx",))
    checks = PartChecks(translation(), champion, folders, batch_size=64, num_golden=2)
    refused: dict[str, Any] = {
        name: {finding.check for finding in checks.check(name).findings}
        for name in ("encoder.onnx", "decoder_step.onnx", "together.onnx")
    }
    assert {"lineage", "numbers"} <= refused["encoder.onnx"]
    assert {"lineage", "numbers"} <= refused["decoder_step.onnx"]
    assert "together" in refused["together.onnx"]


def calls_of_the_decoder(champion: Path) -> list[Inputs]:
    found, calls = translation(), []
    runs = eager_runs(found, champion)

    def recorded(inputs: Inputs) -> list[Tensor]:
        calls.append(inputs)
        return runs["decoder_step"](inputs)

    for batch in evaluation_batches(found.dataset("test"), parts.BATCH_SIZE):
        found.assemble({**runs, "decoder_step": recorded}, batch)
        if sum(len(inputs[0]) for inputs in calls) >= parts.NUM_RECORDED:
            break
    return calls


@pytest.mark.parametrize(
    ("num_bytes", "num_recorded"), [(2**30, 192), (1, 33), (None, 50)], ids=["all", "least", "some"]
)
def test_a_part_is_checked_on_samples_spread_over_all_that_it_was_given(
    num_bytes: int | None, num_recorded: int, champion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of_the_decoder(champion)
    given = [torch.cat(column) for column in zip(*calls, strict=True)]
    if num_bytes is None:  # of 50 samples with what the part returns of them
        outputs = eager_runs(translation(), champion)["decoder_step"](calls[0])
        sample_bytes = sum(t[0].nbytes for t in (*calls[0], *outputs))
        num_bytes = num_recorded * sample_bytes
    monkeypatch.setattr(parts, "RECORDED_BYTES", num_bytes)
    part = PartExperiment(translation(), "decoder_step", champion)
    spread = torch.linspace(0, len(given[0]) - 1, num_recorded).long()
    for _ in range(2):
        dataset = part.dataset("test")
        assert len(dataset) == num_recorded
        for number, row in enumerate(spread.tolist()):
            inputs, index = dataset[number]
            assert index == number
            assert all(map(torch.equal, inputs, [tensor[row] for tensor in given]))


def test_a_part_that_is_missing_is_refused(champion: Path, tmp_path: Path) -> None:
    folders = tmp_path, tmp_path
    checks = PartChecks(translation(), champion, folders, batch_size=64, num_golden=2)
    assert [finding.check for finding in checks.check("together.onnx").findings] == ["runtime"]


def test_a_model_of_one_graph_has_no_parts() -> None:
    digits = Digits(Context(DigitsSettings()))
    assert part_names(digits) == ()
    assert check_names(digits, ("onnx",)) == ()
