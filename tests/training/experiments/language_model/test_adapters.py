"""A language model's own checkpoint, fine-tuned on another text by adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.training.errors import CheckpointMismatchError, DataFormatError
from holdfast.training.experiment.protocol import Context
from holdfast.training.experiments.language_model.adapters import (
    AdaptedLanguageModel,
    AdaptersSettings,
)
from tests.faults.campaign import Training, complete
from tests.generality.harness import QUICK_EXPORT, assert_exact, assert_published
from tests.training.experiments.language_model.test_experiment import (
    OVERRIDES,
    SMALL,
    experiment,
    model_of,
)

BPE = ('experiment.vocabulary="bpe"', "experiment.vocabulary_size=280")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file(model_of(experiment(vocabulary="bpe", vocabulary_size=280)).state_dict(), path)
    return path


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "ships.txt").write_text("Größere Schiffe fahren weiter, sagt man.\n" * 60)
    return folder


def tuned(folder: Path, **settings: Any) -> AdaptedLanguageModel:
    return AdaptedLanguageModel(Context(AdaptersSettings(**{**SMALL, **settings}), folder))


def test_it_begins_as_the_base_in_its_vocabulary_and_folds_what_it_learnt(
    base: Path, other_text: Path
) -> None:
    found = tuned(other_text, base=base)
    model, plain = found.model().eval(), found.plain_model().eval()
    plain.load_state_dict(load_file(base))
    inputs, _ = found.dataset("validation").fetch([0, 1])
    with torch.no_grad():
        assert torch.equal(model(*inputs), plain(*inputs))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (".up" in name or ".down" in name)
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
        trained = model(*inputs)
        assert not torch.allclose(trained, plain(*inputs), atol=0.1)
        merged = found.merged(model)
        assert torch.allclose(merged(*inputs), trained, atol=1e-3)
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_a_base_of_another_size_or_without_a_vocabulary_is_refused(
    base: Path, other_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointMismatchError, match="use the settings and the code"):
        tuned(other_text, base=base, width=8).model()
    strange = tmp_path / "strange.safetensors"
    save_file({"weight": torch.zeros(3)}, strange)
    with pytest.raises(DataFormatError, match=r"strange.*has no vocabulary .*of ours"):
        tuned(other_text, base=strange).dataset("train")


@pytest.mark.slow
def test_from_its_own_checkpoint_adapters_alone_are_kept_and_one_model_is_published(
    other_text: Path, tmp_path: Path
) -> None:
    first = Training(tmp_path, "first", "language_model", (*OVERRIDES, *BPE))
    complete(first)
    checkpoint = sorted(first.run.checkpoints.iterdir())[-1]
    overrides = (
        *(value for value in OVERRIDES if "num_generated" not in value),
        f"experiment.base={checkpoint}",
        f"data.folder={other_text}",
        *QUICK_EXPORT,
    )
    calm = assert_exact("language_model_lora", tmp_path, overrides)
    kept = load_file(sorted(calm.checkpoints.iterdir())[-1] / "model.safetensors")
    assert {name.rpartition(".")[2] for name in kept} == {"up", "down", "vocabulary"}
    history = json.loads((sorted(calm.checkpoints.iterdir())[-1] / "state.json").read_text())
    losses = [epoch["metrics"]["loss"] for epoch in history["history"]]
    assert losses[-1] < losses[0]
    training = Training(tmp_path / "calm", "one", "language_model_lora", overrides)
    run = assert_published(training)
    names = load_file(run.bundle / "model.safetensors").keys()
    assert not [name for name in names if ".up" in name or ".base." in name]
