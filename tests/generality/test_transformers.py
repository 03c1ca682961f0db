"""A model of the library transformers as it is, with batches as its collators make them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from holdfast.training.configuration.schema import ExportConfig
from holdfast.training.export.artifacts import open_champion, write_artifacts
from holdfast.training.export.formats import formats
from holdfast.training.loop.segment import run_segment
from holdfast.training.parity.champion import Champion
from holdfast.training.parity.parity import Int8Limits, check_artifact
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.stage import StageArguments, prepared_stage
from tests.faults.campaign import Training, differences, final_state
from tests.generality.harness import QUICK_EXPORT, assert_exact, assert_published

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is loaded from there
NUM_TOKENS = 40
NUM_STEPS = 5 * 8
OVERRIDES = (
    "checkpoint.every_steps=7",
    "checkpoint.is_auto=false",
    "checkpoint.keep_last=3",
    "preemption.sources=[]",
)


class Texts:
    """Dicts of token ids of 4 to 11 tokens, padded to the longest of their batch."""

    def __init__(self, split: str) -> None:
        draws = torch.Generator().manual_seed(len(split))
        lengths = torch.randint(4, 12, (64,), generator=draws).tolist()
        self._items = [torch.randint(1, NUM_TOKENS, (n,), generator=draws) for n in lengths]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._items[index], "labels": int(self._items[index][0] > 20)}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens = [item["input_ids"] for item in items]
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        labels = torch.tensor([item["labels"] for item in items])
        mask = (padded > 0).long()
        return {"input_ids": padded, "attention_mask": mask, "labels": labels}


class Bert:
    """``run_glue``: ``model(**batch).loss`` to train, ``.logits`` to score."""

    input_names = ("input_ids", "attention_mask")
    dynamic_dimensions: Mapping[str, Any] = {
        "input_ids": {1: "length"},
        "attention_mask": {1: "length"},
    }
    defaults: Mapping[str, Any] = {
        "train": {"num_epochs": 5},
        "data": {"batch_size": 8, "evaluation_batch_size": 16},
        "optimizer": {"args": {"lr": 0.005}},
        "ema": {"decays": [0.9]},
        "selection": {"num_bootstrap": 100},
    }

    def __init__(self, context: Any) -> None:
        pass

    def dataset(self, split: str) -> Texts:
        return Texts(split)

    def model(self) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(
            BertConfig(
                vocab_size=NUM_TOKENS,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=32,
            )
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def score(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = model(**batch).logits
        return {"loss": cross_entropy(logits, batch["labels"], reduction="none")}

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_bert_goes_on_as_it_stood_to_exports_of_any_length(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    runs = [train(tmp_path / name, should_resume=name == "resumed") for name in ("calm", "resumed")]
    assert differences(*map(final_state, runs)) == []
    champion_file = runs[0].checkpoint(NUM_STEPS) / "model.safetensors"
    names = ("weights", "onnx", "exported_program", "torchscript")
    experiment: Any = Bert(None)
    source, place = open_champion(
        experiment, champion_file, ExportConfig(), tmp_path / "bundle", tmp_path / "scratch"
    )
    write_artifacts(source, place, names)
    champion = Champion.load(experiment, champion_file, 16)
    assert {"length-4", "length-11"} <= set(champion.references)
    for name in names:
        report = check_artifact(champion, name, formats()[name], place, Int8Limits())
        assert report.findings == []
    assert [port.shape for port in champion.interface.inputs] == [("length",), ("length",)]
    assert [port.name for port in champion.interface.outputs] == ["logits"]


def train(store: Path, *, should_resume: bool) -> RunDirectory:
    """A whole run in this process, where the library is loaded once; or one that is resumed."""
    for number in range(1 + should_resume):
        asked = StageArguments(
            f"{__file__}:Bert", store, "one", 1, overrides=OVERRIDES, progress_format="none"
        )
        with prepared_stage(asked) as stage:
            assert run_segment(stage).outcome == "completed"
            run = stage.run
        if should_resume and number == 0:
            shutil.rmtree(run.checkpoint(NUM_STEPS))
    return run


@pytest.mark.slow
def test_bert_is_exact_to_a_bundle_of_any_length(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    experiment = f"{__file__}:Bert"
    assert_exact(experiment, tmp_path)
    calm = Training(tmp_path / "calm", "one", experiment, QUICK_EXPORT)
    bundle = assert_published(calm).bundle
    assert (
        'name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ]'
        in (bundle / "config.pbtxt").read_text()
    )
