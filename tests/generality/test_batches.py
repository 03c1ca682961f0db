"""Batches of many kinds: dicts, images alone, named tuples, dataclasses; and a loss that is told
where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from holdfast.training.bundles import consumer
from tests.faults.campaign import Training, complete, differences, final_state
from tests.generality.harness import QUICK_EXPORT, assert_exact, assert_published

NUM_TOKENS = 30


class Base:
    """Two classes of six numbers; how an item looks is said by ``item``."""

    defaults: Mapping[str, Any] = {
        "train": {"num_epochs": 8},
        "data": {"batch_size": 12, "evaluation_batch_size": 16},
        "optimizer": {"args": {"lr": 0.01}},
        "ema": {"decays": [0.9]},
        "selection": {"num_bootstrap": 100},
    }

    def __init__(self, context: Any) -> None:
        pass

    def dataset(self, split: str) -> Any:
        draws = torch.Generator().manual_seed(len(split))
        return [self.item(torch.randn(6, generator=draws)) for _ in range(100)]

    def item(self, values: Tensor) -> Any:
        return values, int(values[0] > 0)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 2))

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0]), batch[1]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(*self.logits_and_labels(model, batch))

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        logits, labels = self.logits_and_labels(model, batch)
        return {
            "loss": cross_entropy(logits, labels, reduction="none"),
            "correct": (logits.argmax(1) == labels).float(),
        }

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in records.items()}


class DictItems(Base):
    """As data sets for transformers have them, batched by torch's own collation."""

    input_names = ("left", "right")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, right: Tensor, left: Tensor) -> Tensor:
            return self.layer(torch.cat((left, right), 1))  # type: ignore[no-any-return]

    def item(self, values: Tensor) -> Any:
        return {"label": int(values[0] > 0), "left": values[:2], "right": values[2:]}

    def model(self) -> nn.Module:
        return self.Net()

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(left=batch["left"], right=batch["right"]), batch["label"]


class Target(NamedTuple):
    label: Any
    weight: Any


class NamedTuples(Base):
    def item(self, values: Tensor) -> Any:
        return values, Target(int(values[0] > 0), 1.0)

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        assert isinstance(targets, Target)
        return model(inputs) * targets.weight.float().mean(), targets.label


@dataclass(frozen=True)
class Truth:
    label: Any
    weights: tuple[Any, ...]
    note: Any = None


@dataclass
class Example:
    points: Any
    truth: Truth


class Answer(NamedTuple):
    logits: Tensor
    hidden: Tensor | None = None


@dataclass
class Answers:
    answer: Answer
    total: Tensor
    aside: Tensor | None = None


class Dataclasses(Base):
    """A dataclass in a dataclass goes in, and a named tuple in a dataclass comes out."""

    input_names = ("points",)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, points: Tensor) -> Answers:
            return Answers(Answer(self.layer(points)), points.sum(1))

    def item(self, values: Tensor) -> Any:
        return Example(values, Truth(int(values[0] > 0), (1.0, values[:1])))

    def model(self) -> nn.Module:
        return self.Net()

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, Example)
        assert batch.truth.note is None
        found = model(batch.points)
        assert found.answer.hidden is None
        assert found.total.shape == (len(batch.points),)
        return found.answer.logits, batch.truth.label


class Vae(Base):
    """Images alone, and draws in the model."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_variance = self.encoder(images).chunk(2, 1)
            deviation = (0.5 * log_variance).exp()
            noise = torch.randn_like(deviation) if self.training else torch.zeros_like(deviation)
            return self.decoder(mean + noise * deviation), mean, log_variance

    def item(self, values: Tensor) -> Any:
        return values.sigmoid()

    def model(self) -> nn.Module:
        return self.Net()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return self.score(model, batch)["loss"].mean()

    def score(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        found, mean, log_variance = model(batch)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return {"loss": (found - batch).square().sum(1) + 0.1 * divergence}


class Placed(Base):
    """Warms a term of the loss up by the step, and draws by the place."""

    def loss(self, model: nn.Module, batch: Any, at: Any) -> Tensor:
        draws = torch.Generator().manual_seed(1000 * at.seed + 10 * at.step + at.microbatch)
        noise = torch.randn(batch[0].shape, generator=draws)
        expected = (at.epoch, at.step_in_epoch) == divmod(at.step, 9)
        assert expected, at
        weight = min(1.0, at.step / 20)
        return super().loss(model, batch) + weight * model(noise).square().mean()


class Texts:
    """Sequences of 3 to 9 tokens as dicts, padded to the longest of their batch."""

    def __init__(self, split: str) -> None:
        draws = torch.Generator().manual_seed(len(split))
        lengths = torch.randint(3, 10, (100,), generator=draws).tolist()
        self._items = [torch.randint(1, NUM_TOKENS, (n,), generator=draws) for n in lengths]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        tokens = self._items[index]
        return {"input_ids": tokens, "label": int(tokens.sum() > 90)}

    def collate(self, items: list[Any]) -> Any:
        tokens = [item["input_ids"] for item in items]
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        return {
            "input_ids": padded,
            "attention_mask": (padded > 0).long(),
            "labels": torch.tensor([item["label"] for item in items]),
        }


class Output(dict[str, Any]):
    """As transformers has it: a dict with attributes, without what is None."""

    def __init__(self, **found: Tensor | None) -> None:
        super().__init__({name: value for name, value in found.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


class Glue(Base):
    """A model with a head of its own loss, called with the whole batch."""

    input_names = ("input_ids", "attention_mask")
    dynamic_dimensions: Mapping[str, Any] = {
        "input_ids": {1: "length"},
        "attention_mask": {1: "length"},
    }

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(NUM_TOKENS, 8), nn.Linear(8, 2)

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
        ) -> Output:
            hidden = self.tokens(input_ids) * attention_mask[..., None]
            logits = self.head(hidden.sum(1) / attention_mask.sum(1, keepdim=True))
            loss = None if labels is None else cross_entropy(logits, labels)
            return Output(loss=loss, logits=logits, hidden_states=(hidden, hidden.tanh()))

    def dataset(self, split: str) -> Any:
        return Texts(split)

    def model(self) -> nn.Module:
        return self.Net()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        found = model(**batch)
        assert found["logits"] is found.logits
        return found.logits, batch["labels"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DictItems", "NamedTuples", "Dataclasses", "Placed"])
def test_a_batch_of_any_kind_is_exact(name: str, tmp_path: Path) -> None:
    overrides = ("train.num_microbatches=2",) if name == "Placed" else ()
    assert_exact(f"{__file__}:{name}", tmp_path, overrides)


@pytest.mark.slow
def test_loader_processes_send_batches_of_any_kind(tmp_path: Path) -> None:
    experiment = f"{__file__}:Dataclasses"
    runs = [
        Training(tmp_path, f"with-{num}", experiment, (f"data.num_workers={num}",))
        for num in (0, 1)
    ]
    for training in runs:
        complete(training)
    assert differences(*(final_state(training.run) for training in runs)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Vae", "Dataclasses"])
def test_images_alone_and_dataclasses_come_to_their_bundle(name: str, tmp_path: Path) -> None:
    experiment = f"{__file__}:{name}"
    if name == "Vae":
        assert_exact(experiment, tmp_path)
    calm = Training(tmp_path / "calm", "one", experiment, QUICK_EXPORT)
    complete(calm)
    manifest = consumer.verify_files(assert_published(calm).bundle)
    names = [port["name"] for port in manifest["interface"]["outputs"]]
    wanted = {"Vae": [f"output_{i}" for i in range(3)], "Dataclasses": ["answer_logits", "total"]}
    assert names == wanted[name]


@pytest.mark.slow
def test_glue_padded_to_the_longest_is_exact_to_a_bundle_of_any_length(tmp_path: Path) -> None:
    experiment = f"{__file__}:Glue"
    assert_exact(experiment, tmp_path)
    calm = Training(tmp_path / "calm", "one", experiment, QUICK_EXPORT)
    bundle = assert_published(calm).bundle
    manifest = consumer.verify_files(bundle)
    inputs, outputs = (manifest["interface"][kind] for kind in ("inputs", "outputs"))
    assert [(port["name"], port["shape"]) for port in inputs] == [
        ("input_ids", ["length"]),
        ("attention_mask", ["length"]),
    ]
    assert [(port["name"], port["shape"]) for port in outputs] == [
        ("logits", [2]),
        ("hidden_states_0", ["length", 8]),
        ("hidden_states_1", ["length", 8]),
    ]
    assert "golden outputs are right" in consumer.proof(bundle)
    lengths = {path.name.split(".")[0] for path in (bundle / "golden").glob("length-*.npy")}
    assert {"length-3", "length-9"} <= lengths
    session = consumer.open_session(bundle / consumer.MODEL)
    for length in (1, 5, 40):
        tokens = np.arange(2 * length).reshape(2, length) % (NUM_TOKENS - 1) + 1
        asked = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        assert consumer.run(session, manifest, asked)["hidden_states_0"].shape == (2, length, 8)
    with pytest.raises(consumer.WrongInputError, match="where length=40"):
        consumer.run(session, manifest, {**asked, "attention_mask": np.ones((2, 39))})
