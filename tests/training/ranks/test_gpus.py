"""A GPU for each process of a machine, and what several of them compute."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from holdfast.training.errors import ConfigError
from holdfast.training.exactness.trial import Trial
from holdfast.training.ranks.gpus import VISIBLE, environments_of_ranks
from tests.faults.campaign import Training, complete, differences, final_state

NUM_GPUS = torch.cuda.device_count()


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv(VISIBLE, raising=False)


def seen(num_here: int) -> list[str | None]:
    return [own.get(VISIBLE) for own in environments_of_ranks(num_here, 1, "auto")]


@pytest.mark.usefixtures("three_gpus")
def test_each_process_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(3) == ["0", "1", "2"]
    assert seen(1) == ["0"]
    monkeypatch.setenv(VISIBLE, "5, GPU-8d1b, 2")  # as a worker is given them
    assert seen(2) == ["5", "GPU-8d1b"]


@pytest.mark.usefixtures("three_gpus")
def test_too_few_gpus_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"machine has 3; write distributed.num_processes=3, or"):
        environments_of_ranks(4, 1, "cuda")
    assert [own.get(VISIBLE) for own in environments_of_ranks(4, 1, "cpu")] == [None] * 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("num_shards", [None, 4])
def test_kills_change_no_byte_on_two_gpus(
    tmp_path: Path, strategy: str, num_shards: int | None
) -> None:
    overrides = [f"distributed.strategy={strategy}", "distributed.num_processes=2"]
    overrides += ["train.device=cuda", "data.should_drop_last=true", "train.num_epochs=3"]
    overrides += [] if num_shards is None else [f"distributed.num_shards={num_shards}"]
    calm = Training(tmp_path, "calm", "digits", tuple(overrides))
    complete(calm)
    killed = Training(tmp_path, "killed", "digits", tuple(overrides))
    for step, number in ((5, signal.SIGKILL), (12, signal.SIGTERM)):
        trial = Trial(stop_at=step, stop_signal=number.name, rank=1)
        assert killed.start(trial.environment(), []).finish() != 0
    width = [] if num_shards is None else ["--set", "distributed.num_processes=1"]
    assert killed.start({}, width).finish() == 0
    assert differences(final_state(calm.run), final_state(killed.run)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU")
def test_a_kill_changes_no_byte_of_shards_on_one_gpu(tmp_path: Path) -> None:
    overrides = ("distributed.strategy=ddp", "distributed.num_shards=4", "train.device=cuda")
    calm = Training(tmp_path, "calm", "digits", (*overrides, "train.num_epochs=3"))
    complete(calm)
    killed = Training(tmp_path, "killed", "digits", (*overrides, "train.num_epochs=3"))
    trial = Trial(stop_at=7, stop_signal=signal.SIGKILL.name, rank=0)
    assert killed.start(trial.environment(), []).finish() != 0
    complete(killed)
    assert differences(final_state(calm.run), final_state(killed.run)) == []
