"""Segments whose weights lie in slices on several processes, as users start them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from holdfast.training.checkpointing.loading import load_weights
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.losses import compare_losses
from tests.faults.campaign import Training, differences, final_state
from tests.training.ranks.test_several_processes import (
    EXPERIMENTS,
    OFTEN,
    TIED,
    failed,
    started,
    stopped,
)
from tests.training.ranks.tied_transformer import Model

SPREAD = (*OFTEN, "distributed.strategy=fsdp", "data.should_drop_last=true")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("experiment", "own"),
    [
        (TIED, ("train.precision=bf16",)),
        (f"{EXPERIMENTS}:HardInShards", ()),
    ],
)
def test_the_same_number_of_processes_ends_with_the_same_bytes(
    tmp_path: Path, experiment: str, own: tuple[str, ...]
) -> None:
    overrides = (*SPREAD, "train.num_epochs=2", *own)
    calm = Training(tmp_path, "calm", experiment, overrides)
    segment = started(calm, 3)
    assert segment.finish() == 0, "".join(segment.errors)
    killed = Training(tmp_path, "killed", experiment, overrides)
    stopped(killed, 3, signal.SIGKILL, 4, rank=1)
    stopped(killed, 3, signal.SIGTERM, 8, rank=2)
    code, line = failed(killed, 2)
    assert (code, "distributed.num_processes: 3 there, 2 here" in line) == (2, True)
    assert started(killed, 3).finish() == 0
    assert differences(final_state(calm.run), final_state(killed.run)) == []
    assert compare_losses(killed.run).num_different == 0
    assert [record.num_processes for record in read_segments(killed.run)] == [3, 3, 3]
    if experiment == TIED:
        [newest] = sorted(killed.run.checkpoints.iterdir())[-1:]
        names = {path.name for path in newest.glob("model*")}
        assert names == {f"model-0000{rank}-of-00003.safetensors" for rank in (1, 2, 3)}
        weights = load_weights(newest)
        assert weights["head.weight"] is weights["embedding.weight"]
        Model().load_state_dict(weights)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.should_drop_last=false"], "data.should_drop_last=false does not go with"),
        (["distributed.num_shards=4"], "num_shards is not there with strategy=fsdp yet"),
        (["train.should_compile=true"], "train.should_compile=true does not go with"),
        (["checkpoint.frozen=left_out"], "checkpoint.frozen=left_out does not go with"),
    ],
)
def test_what_does_not_go_with_slices_is_refused_in_one_line(
    tmp_path: Path, overrides: list[str], told: str
) -> None:
    run = Training(tmp_path, "one", "digits", (*SPREAD, *overrides))
    segment = run.start()
    assert segment.finish() == 2
    [line] = [line for line in segment.errors if line.startswith("error: ")]
    assert told in line
    assert not run.run.path.exists()
