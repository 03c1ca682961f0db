"""A model of the library transformers as it is, with batches as its collators make them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.faults.campaign import Training
from tests.generality.harness import QUICK_EXPORT, assert_exact, assert_published

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is loaded from there
NUM_TOKENS = 40


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
