"""Segments whose weights lie in slices on several processes, as users start them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from holdfast.training.checkpointing.loading import load_weights
from holdfast.training.experiments.turbofan.synthetic import Fleet, write_fleet
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.faultpoints import FAULT_POINTS, SLICE_POINTS
from holdfast.training.runs.losses import compare_losses
from tests.faults.campaign import (
    Ranking,
    Training,
    check_latest_is_good,
    complete,
    differences,
    final_state,
)
from tests.generality.harness import assert_published
from tests.training.ranks.test_several_processes import (
    EXPERIMENTS,
    OFTEN,
    TIED,
    failed,
    started,
    stopped,
)
from tests.training.ranks.tied_transformer import Model

FULL = f"{Path(__file__).with_name('full_disk.py')}:HardInShards"
THREE = "distributed.num_processes=3"
DDP = ("distributed.strategy=ddp",)
SPREAD = (*OFTEN, "distributed.strategy=fsdp", "data.should_drop_last=true")
LONGER = (*SPREAD, "train.num_epochs=8")


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


KINDS: dict[str, tuple[str, ...]] = {
    "tied": (TIED,),
    "hard": (f"{EXPERIMENTS}:HardInShards", "train.clip_norm=0.5"),
    "digits": (
        "digits",
        "train.clip_norm=1.0",
        "train.num_microbatches=2",
        "ema.decays=[0.9,0.99]",
        'scheduler.name="ReduceLROnPlateau"',
        "scheduler.args.patience=0",
    ),
    "engines": ("turbofan", "data.batch_size=16"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_four_one_two_and_four_processes_end_with_the_bytes_of_one(
    tmp_path: Path, kind: str
) -> None:
    experiment, *own = KINDS[kind]
    overrides = (*SPREAD, "distributed.num_shards=4", "train.num_epochs=3", *own)
    ranking: Ranking = ("accuracy", "max")
    if kind == "engines":
        write_fleet(tmp_path / "engines", Fleet(num_train=30, longest_life=90))
        overrides += (f"data.folder={tmp_path / 'engines'}",)
        ranking = ("rmse", "min")
    calm = Training(tmp_path, "calm", experiment, overrides)
    complete(calm)
    killed = Training(tmp_path, "killed", experiment, overrides)
    stopped(killed, 4, signal.SIGKILL, 5, rank=2)
    stopped(killed, 1, signal.SIGKILL, 8, rank=0)
    stopped(killed, 2, signal.SIGKILL, 11, rank=1)
    assert started(killed, 4).finish() == 0
    assert differences(final_state(calm.run, ranking), final_state(killed.run, ranking)) == []
    assert compare_losses(killed.run).num_different == 0
    widths = [record.num_processes for record in read_segments(killed.run)]
    assert widths == [4, 1, 2, 4]
    code, line = failed(Training(tmp_path, "killed", experiment, overrides + DDP), 4)
    assert (code, "distributed.strategy" in line) == (2, True)
    if kind == "digits":
        runs = [assert_published(training) for training in (calm, killed)]
        made = [
            {p.parent.name: p.read_bytes() for p in run.candidates.glob("*/model.safetensors")}
            for run in runs
        ]
        assert len(made[0]) > 3
        assert made[0] == made[1]


POINTS = [
    *SLICE_POINTS,
    *(
        point
        for point in FAULT_POINTS
        if point.startswith(("save.", "write.", "flush.", "verify.", "commit.", "slim.", "prune."))
    ),
]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = Training(tmp_path_factory.mktemp("calm"), "calm", FULL, LONGER)
    assert started(run, 3).finish() == 0
    return final_state(run.run)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("points", [POINTS[:8], POINTS[8:16], POINTS[16:]])
def test_a_kill_at_any_point_of_a_commit_by_several_does_not_change_a_byte(
    tmp_path: Path, calm: dict[str, bytes], points: list[str]
) -> None:
    run = Training(tmp_path, "killed", FULL, LONGER)
    for point in points:
        segment = run.start({"HOLDFAST_FAULT_POINT": point}, ["--set", THREE])
        assert segment.finish() == 1, f"{point}: {''.join(segment.errors)}"
        assert segment.has_lost_a_rank(), f"{point}: {''.join(segment.errors)}"
        check_latest_is_good(run.run)
    assert started(run, 3).finish() == 0
    assert differences(calm, final_state(run.run)) == []
    assert compare_losses(run.run).num_different == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_rank_s_file_that_was_cut_off_costs_its_checkpoint_alone(
    tmp_path: Path, calm: dict[str, bytes]
) -> None:
    run = Training(tmp_path, "killed", FULL, LONGER)
    stopped(run, 3, signal.SIGTERM, 8, rank=1)
    path = run.run.checkpoint(9) / "optimizer-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-16])
    segment = started(run, 3)
    assert segment.finish() == 0
    [told] = [line for line in segment.errors if "set aside" in line]
    assert "optimizer-00002-of-00003.safetensors has " in told
    assert differences(calm, final_state(run.run)) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_times", [1, 1000])
def test_a_disk_that_is_full_for_one_rank_is_told_and_tried_again(
    tmp_path: Path, calm: dict[str, bytes], num_times: int
) -> None:
    run = Training(tmp_path, "full", FULL, LONGER)
    segment = run.start({"FULL_TIMES": str(num_times)}, ["--set", THREE])
    code = segment.finish()
    errors = "".join(segment.errors)
    assert "rank 2: cannot write" in errors
    assert "No space left on device" in errors
    if num_times == 1:
        assert code == 0, errors
        assert "failed and is tried again when the next one is due" in errors
        assert differences(calm, final_state(run.run)) == []
        return
    assert code == 1
    assert [line for line in segment.errors if line.startswith("error: ")]
    assert not list(run.run.checkpoints.glob("step-*"))
    assert started(run, 3).finish() == 0
    assert differences(calm, final_state(run.run)) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_goes_wrong_on_one_rank_ends_all_with_one_line(tmp_path: Path) -> None:
    run = Training(tmp_path, "one", f"{EXPERIMENTS}:FailsOnOne", SPREAD)
    code, line = failed(run, 3)
    assert code == 1
    assert "rank 2: " in line
    assert "this one sample" in line


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.should_drop_last=false"], "data.should_drop_last=false does not go with"),
        (
            ["distributed.num_shards=6", "distributed.num_processes=3"],
            "num_processes=3 does not go with num_shards=6 and strategy=fsdp: use a power of two "
            "that divides num_shards, up to 2 processes",
        ),
        (
            ["distributed.num_shards=6", "distributed.num_processes=4"],
            "num_processes=4 does not go with num_shards=6",
        ),
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
