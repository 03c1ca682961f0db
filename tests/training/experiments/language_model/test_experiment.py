from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from holdfast.training.bundles.continuing import PREFILL, STEP, continued
from holdfast.training.errors import (
    CheckpointMismatchError,
    DataFormatError,
    DataNotFoundError,
)
from holdfast.training.experiment.protocol import Context, Dataset, Records
from holdfast.training.experiments.language_model.experiment import (
    LanguageModel,
    LanguageModelSettings,
)
from holdfast.training.experiments.language_model.graphs import continuation, runs_of
from holdfast.training.experiments.language_model.model import Gpt
from holdfast.training.experiments.language_model.tokens import stored_tokens
from holdfast.training.loop.evaluation import evaluate
from holdfast.training.runs.losses import compare_losses
from tests.faults.campaign import Training, complete, differences, final_state
from tests.generality.harness import OFTEN, QUICK_EXPORT, assert_exact, assert_published
from tests.training.ranks.test_several_processes import started, stopped
from tests.training.streams.stream_writers import write_lines, write_tar

SMALL = {"num_generated": 200, "context": 16, "width": 16, "num_layers": 2, "num_heads": 2}
OVERRIDES = (
    *(f"experiment.{name}={value}" for name, value in SMALL.items()),
    "data.batch_size=8",
    "train.num_epochs=4",
    "train.steps_per_epoch=6",
    "scheduler.args.T_max=20",
    "warmup.num_steps=4",
    "train.num_threads=1",
)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def experiment(folder: Path | None = None, **settings: Any) -> LanguageModel:
    return LanguageModel(Context(LanguageModelSettings(**{**SMALL, **settings}), folder))


def model_of(found: LanguageModel) -> Gpt:
    torch.manual_seed(0)
    model = found.plain_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that what it writes is not the same token for ever
    return model


def test_the_end_of_a_text_is_told_and_nothing_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("The second. " * 100)
    (tmp_path / "a.txt").write_bytes(b"The first.\r\n" * 100)
    found = experiment(tmp_path, validation_fraction=0.1, test_fraction=0.2)
    texts = found._texts
    assert "".join(texts.values()) == "The first.\r\n" * 100 + "The second. " * 100
    assert [len(texts[split]) for split in ("train", "validation", "test")] == [1680, 240, 480]
    windows = found.dataset("validation")
    told = np.concatenate([windows.fetch([n])[0][1][0].numpy() for n in range(len(windows))])
    expected = found.vocabulary.encode(texts["validation"])[1:]
    assert told.tolist() == expected[: len(told)]
    assert len(expected) - len(told) < 16
    assert len(found.dataset("train")) == 1680 - 16


def test_metrics_are_those_of_the_whole_text_however_it_is_cut_into_batches() -> None:
    found = experiment(vocabulary="bpe", vocabulary_size=280, num_continuations=3)
    model, dataset = model_of(found), found.dataset("validation")
    together = evaluate(found, model, dataset, batch_size=64)
    apart = evaluate(found, model, dataset, batch_size=3)
    assert together is not None
    assert apart is not None
    assert together["is_continued"].sum() == 3
    metrics = found.metrics(together)
    assert metrics == pytest.approx(found.metrics(apart))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    nats = metrics["loss"] * together["num_tokens"].sum()
    bytes_told = sum(
        len(found.vocabulary.bytes_of[n])
        for index in range(len(dataset))
        for n in dataset[index][0][1].tolist()
    )
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_told)


@pytest.mark.parametrize("positions", ["learnt", "rotary"])
@pytest.mark.parametrize("has_biases", [False, True])
def test_token_by_token_is_what_the_model_says_of_the_whole(
    positions: str, has_biases: bool
) -> None:
    found = experiment(positions=positions, has_biases=has_biases)
    model = model_of(found)
    tokens = torch.randint(found.vocabulary.size, (3, 16))
    with torch.no_grad():
        costs = model(tokens[:, :-1], tokens[:, 1:])
        length = torch.tensor([4, 4, 4])
        logits, cache = model.prefill(tokens, length)
        for position in range(4, 16):
            expected = torch.log_softmax(logits, -1).gather(1, tokens[:, position : position + 1])
            assert torch.allclose(-expected[:, 0], costs[:, position - 1], atol=1e-4)
            if position < 15:
                here = torch.full((3,), position)
                logits, cache = model.step(tokens[:, position], here, cache)


def test_what_stands_after_the_prompt_is_not_seen() -> None:
    model = model_of(experiment())
    tokens = torch.randint(10, (2, 16))
    other = tokens.clone()
    other[:, 5:] = 3
    length = torch.tensor([5, 3])
    with torch.no_grad():
        one, changed = model.prefill(tokens, length), model.prefill(other, length)
    assert torch.equal(one[0], changed[0])
    assert torch.equal(one[1], changed[1])


def test_a_text_goes_on_past_the_context() -> None:
    found = experiment()
    model = model_of(found)
    runs = runs_of(model)

    def numpy_run(name: str) -> Any:
        def run(arrays: dict[str, Any]) -> list[Any]:
            with torch.no_grad():
                inputs = tuple(torch.from_numpy(array) for array in arrays.values())
                return [output.numpy() for output in runs[name](inputs)]

        return run

    prompt = found.vocabulary.encode("the old ")
    added = continued(numpy_run(PREFILL), numpy_run(STEP), 16, prompt)
    first = [next(added) for _ in range(40)]
    tokens = torch.tensor([prompt + [0] * 8])
    with torch.no_grad():
        assert first[:8] == continuation(runs, tokens, 8)[0].tolist()
        known = prompt + first[:9]  # the token that did not fit any more
        tokens = torch.tensor([known[-8:] + [0] * 8])
        assert first[9:17] == continuation(runs, tokens, 8)[0].tolist()


def test_norms_and_biases_do_not_decay() -> None:
    found = experiment(has_biases=True)
    model = model_of(found)
    groups = {group["name"]: group for group in found.parameter_groups(model)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {names[id(parameter)] for parameter in groups["no_decay"]["params"]}
    assert all("norm" in name or name.endswith("bias") for name in spared)
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    assert groups["decay"]["weight_decay"] == 0.1
    assert groups["no_decay"]["weight_decay"] == 0.0


def test_weights_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    for name, text in (("one", "abcd"), ("other", "abce")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text * 200)
    one, other = experiment(tmp_path / "one"), experiment(tmp_path / "other")
    model = one.plain_model()
    one.parameter_groups(model)
    with pytest.raises(CheckpointMismatchError, match="stand for other symbols"):
        other.parameter_groups(model)
    with pytest.raises(CheckpointMismatchError, match=r"vocabulary has digest .*trained on"):
        other.load_state_dict(one.state_dict())


def test_tokens_are_encoded_once_and_again_where_their_file_was_changed(scratch: Path) -> None:
    found = experiment()
    files = stored_tokens(found._texts, found.vocabulary)
    before = files["test"].path.stat().st_mtime_ns
    assert stored_tokens(found._texts, found.vocabulary) == files
    (path,) = scratch.rglob("*.npy")
    assert path.stat().st_mtime_ns == before
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert stored_tokens(found._texts, found.vocabulary) == files
    assert path.read_bytes() != bytes(content)
    path.write_bytes(b"")
    assert stored_tokens(found._texts, found.vocabulary) == files


def test_bad_texts_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"nowhere'?.*does not exist.*generated text"):
        experiment(tmp_path / "nowhere").dataset("train")
    with pytest.raises(DataNotFoundError, match=r"has no such file; name others"):
        experiment(tmp_path).dataset("train")
    with pytest.raises(DataNotFoundError, match=r"gone\.txt, which does not exist"):
        experiment(tmp_path, text_files=("gone.txt",)).dataset("train")
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff")
    with pytest.raises(
        DataFormatError, match=r"a\.txt, line 2: expected UTF-8, found the byte 0xff"
    ):
        experiment(tmp_path).dataset("train")
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataFormatError, match="found nothing"):
        experiment(tmp_path).dataset("train")
    (tmp_path / "a.txt").write_bytes(b"abc" * 50)
    with pytest.raises(DataFormatError, match=r"validation has \d tokens, and a window needs 17"):
        experiment(tmp_path).dataset("validation")
    with pytest.raises(ValueError, match="make it even"):
        experiment(positions="rotary", width=6)


def test_a_text_may_lie_in_stream_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", range(100))
    write_tar(tmp_path / "tars" / "b.tar", range(100))
    lines = "".join(f"téxt {number}\n" for number in range(100))
    texts = "".join(f"text {number}\n" for number in range(100))
    found = experiment(tmp_path, text_files=("a.jsonl",))
    assert "".join(found._texts.values()) == lines
    assert len(found.dataset("train")) > 0
    found = experiment(tmp_path / "tars", text_field="txt")
    assert "".join(found._texts.values()) == texts
    with pytest.raises(
        DataFormatError, match=r"sample 0 has no text in its field 'text'; it has _"
    ):
        experiment(tmp_path / "tars").dataset("train")
    with pytest.raises(DataNotFoundError, match=r"gone\.tar does not exist"):
        experiment(tmp_path, text_files=("gone.tar",)).dataset("train")


def test_the_report_is_offered_continuations() -> None:
    found = experiment(num_continuations=3)
    model = model_of(found)

    def measure(dataset: Dataset) -> Records:
        records = evaluate(found, model, dataset, batch_size=64)
        assert records is not None
        return records

    (figure,) = found.figures(measure)
    text = found._texts["validation"]
    assert len(figure.rows) == 3
    for row in figure.rows:
        assert row.source + row.reference in text
        assert len(row.output) == 8


@pytest.mark.slow
def test_kills_change_no_byte(tmp_path: Path) -> None:
    assert_exact("language_model", tmp_path, OVERRIDES)


@pytest.mark.slow
def test_kills_and_loader_processes_change_no_byte_of_a_learnt_vocabulary(tmp_path: Path) -> None:
    learnt = ('experiment.vocabulary="bpe"', "experiment.vocabulary_size=300")
    rotary = ('experiment.positions="rotary"', "experiment.dropout=0.1", "data.num_workers=2")
    assert_exact("language_model", tmp_path, (*OVERRIDES, *learnt, *rotary))


@pytest.mark.slow
def test_two_processes_end_with_the_bytes_of_one(tmp_path: Path) -> None:
    shards = ("distributed.strategy=ddp", "distributed.num_shards=2")
    states = []
    for num in (1, 2):
        overrides = (*OVERRIDES, *shards, f"distributed.num_processes={num}")
        training = Training(tmp_path / str(num), "one", "language_model", overrides)
        complete(training)
        states.append(final_state(training.run))
    assert differences(*states) == []


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_weights_in_slices_end_with_the_same_bytes_after_kills(
    tmp_path: Path, num_processes: int
) -> None:
    slices = ("distributed.strategy=fsdp", "data.should_drop_last=true", "data.batch_size=12")
    overrides = (*OFTEN, *OVERRIDES, *slices, "train.num_epochs=2")
    calm = Training(tmp_path, "calm", "language_model", overrides)
    segment = started(calm, num_processes)
    assert segment.finish() == 0, "".join(segment.errors)
    killed = Training(tmp_path, "killed", "language_model", overrides)
    stopped(killed, num_processes, SIGKILL, 4, rank=num_processes - 1)
    stopped(killed, num_processes, SIGTERM, 8, rank=0)
    assert started(killed, num_processes).finish() == 0
    assert differences(final_state(calm.run), final_state(killed.run)) == []
    assert compare_losses(killed.run).num_different == 0


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("published")
    training = Training(folder, "one", "language_model", (*OVERRIDES, *QUICK_EXPORT))
    complete(training)
    assert_published(training)
    return training


@pytest.mark.slow
def test_the_bundle_goes_on_with_a_text_token_by_token_as_pytorch_does(
    published: Training, tmp_path: Path
) -> None:
    bundle = published.run.bundle
    details = json.loads((bundle / "parity.json").read_text())["details"]
    assert all(report["is_good"] for report in details.values())
    assert {"prefill.onnx", "decode_step.onnx", "together.onnx"} <= set(details)
    (tmp_path / "prompt.txt").write_text("the old ")
    # With onnxruntime and NumPy alone: neither Holdfast nor torch can be imported.
    program = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['holdfast'] = None; "
        "sys.argv = [*sys.argv[1:], '--bundle', '.', '--tokens', '8']; "
        "runpy.run_path('continue_text.py', run_name='__main__')"
    )
    command = [sys.executable, "-P", "-c", program, "continue_text.py"]
    command.append(str(tmp_path / "prompt.txt"))
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=True)
    found = experiment()
    model = found.plain_model().eval()
    model.load_state_dict(load_file(bundle / "model.safetensors"))
    prompt = found.vocabulary.encode("the old ")
    with torch.no_grad():
        added = continuation(runs_of(model), torch.tensor([prompt + [0] * 8]), 8)
    assert done.stdout == "the old " + found.vocabulary.decode(added[0].tolist()) + "\n"
