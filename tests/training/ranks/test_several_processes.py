"""Segments of several processes, as users start them: bytes, stops, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from holdfast.training.exactness.trial import Trial
from holdfast.training.experiments.turbofan.synthetic import Fleet, write_fleet
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.losses import compare_losses
from tests.faults.campaign import Segment, Training, complete, differences, final_state

TIED = f"{Path(__file__).with_name('tied_transformer.py')}:TiedTransformer"
EXPERIMENTS = Path(__file__).parents[2] / "faults" / "hard_experiment.py"
OFTEN = ("logging.every_s=0.0001", "checkpoint.every_steps=3", "checkpoint.is_auto=false")
LONG = ("train.num_epochs=2000", "early_stopping.patience_epochs=2000")
SHARDED = (*OFTEN, "distributed.num_shards=4")


def training(
    folder: Path, name: str, *overrides: str, experiment: str = "HardInShards"
) -> Training:
    return Training(folder, name, f"{EXPERIMENTS}:{experiment}", overrides)


def started(training: Training, num_processes: int, trial: Trial | None = None) -> Segment:
    asked = ["--set", f"distributed.num_processes={num_processes}"]
    return training.start({} if trial is None else trial.environment(), asked)


def failed(training: Training, num_processes: int, trial: Trial | None = None) -> tuple[int, str]:
    """The exit code and the last line of a segment that ends with an error."""
    segment = started(training, num_processes, trial)
    code = segment.finish()
    lines = [line for line in segment.errors if line.startswith("error: ")]
    assert len(lines) == 1, "".join(segment.errors)
    return code, lines[0]


def stopped(training: Training, num_processes: int, number: signal.Signals, step: int, rank: int):
    """A segment in which one rank sends itself a signal after a step."""
    trial = Trial(stop_at=step, stop_signal=number.name, rank=rank)
    segment = started(training, num_processes, trial)
    code = segment.finish()
    assert code == (75 if number == signal.SIGTERM else 1), "".join(segment.errors)
    if number == signal.SIGTERM:
        outcome = segment.events[-1]
        assert (outcome["outcome"], outcome["step"]) == ("preempted", step + 1)
    return segment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_another_number_of_processes_after_a_kill(tmp_path: Path) -> None:
    calm = training(tmp_path, "calm", *SHARDED, "train.num_epochs=2")
    complete(calm)
    killed = training(tmp_path, "killed", *SHARDED, "train.num_epochs=2")
    stopped(killed, 3, signal.SIGKILL, 5, rank=1)
    assert started(killed, 2).finish() == 0
    assert differences(final_state(calm.run), final_state(killed.run)) == []
    compared = compare_losses(killed.run)
    assert (compared.num_different, compared.num_compared > 0) == (0, True)
    first, second = read_segments(killed.run)
    assert (first.num_processes, second.num_processes) == (3, 2)
    assert (first.outcome, second.outcome) == ("failed", "completed")
    assert first.error is not None
    assert "rank 0 of 3 cannot go on: rank 1: ended by SIGKILL" in first.error.message
    assert (killed.run.logs / "segment-0001-rank-2.log").exists()
    again = started(killed, 3)  # nothing is left to do, and no rank is started to find that out
    assert again.finish() == 0
    assert [event["event"] for event in again.events] == ["restored", "outcome"]
    assert again.events[-1]["step"] == second.end_step
    assert len(read_segments(killed.run)) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("experiment", ["digits", f"{EXPERIMENTS}:HardInShards"])
def test_four_one_three_and_two_processes_end_with_the_bytes_of_one(
    tmp_path: Path, experiment: str
) -> None:
    overrides = (*SHARDED, "distributed.strategy=ddp", "train.num_epochs=3", "train.clip_norm=1.0")
    overrides += ("train.num_microbatches=2", "ema.decays=[0.9,0.99]")
    overrides += ('scheduler.name="ReduceLROnPlateau"', "scheduler.args.patience=0")
    calm = Training(tmp_path, "calm", experiment, overrides)
    complete(calm)
    killed = Training(tmp_path, "killed", experiment, overrides)
    stopped(killed, 4, signal.SIGKILL, 5, rank=2)
    stopped(killed, 1, signal.SIGKILL, 10, rank=0)
    stopped(killed, 3, signal.SIGTERM, 15, rank=1)
    assert started(killed, 2).finish() == 0
    assert differences(final_state(calm.run), final_state(killed.run)) == []
    assert compare_losses(killed.run).num_different == 0
    widths = [record.num_processes for record in read_segments(killed.run)]
    assert widths == [4, 1, 3, 2]


KINDS: dict[str, tuple[str, ...]] = {
    "tied": (TIED,),
    "tied, in bf16": (TIED, "train.precision=bf16"),
    "compiled": (
        f"{EXPERIMENTS}:HardInShards",
        "train.should_compile=true",
        "train.num_microbatches=1",
        "data.should_drop_last=true",
    ),
    "several rows": ("digits", "experiment.width=192", "train.max_steps=10"),
    "engines": (
        "turbofan",
        "data.batch_size=8",
        "data.should_drop_last=true",
        "train.max_steps=12",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_other_models_end_with_the_bytes_of_one_process_after_kills_of_three_and_two(
    tmp_path: Path, kind: str
) -> None:
    experiment, *own = KINDS[kind]
    overrides = [*SHARDED, "distributed.strategy=ddp", "train.num_epochs=2", *own]
    if experiment == "turbofan":
        write_fleet(tmp_path / "engines", Fleet(num_train=10, longest_life=90))
        overrides.append(f"data.folder={tmp_path / 'engines'}")
    calm = Training(tmp_path, "calm", experiment, tuple(overrides))
    complete(calm)
    killed = Training(tmp_path, "killed", experiment, tuple(overrides))
    stopped(killed, 3, signal.SIGKILL, 4, rank=1)
    assert started(killed, 2).finish() == 0
    ranking = ("rmse", "min") if experiment == "turbofan" else ("accuracy", "max")
    assert differences(final_state(calm.run, ranking), final_state(killed.run, ranking)) == []
    assert compare_losses(killed.run).num_different == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_shards_the_same_number_of_processes_is_exact(tmp_path: Path) -> None:
    calm = training(tmp_path, "calm", *OFTEN)
    assert started(calm, 3).finish() == 0
    killed = training(tmp_path, "killed", *OFTEN)
    stopped(killed, 3, signal.SIGKILL, 4, rank=0)
    stopped(killed, 3, signal.SIGTERM, 10, rank=2)
    code, line = failed(killed, 2)
    assert code == 2
    assert "distributed.num_processes: 3 there, 2 here" in line
    assert started(killed, 3).finish() == 0
    assert differences(final_state(calm.run), final_state(killed.run)) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_shards_another_number_is_taken_where_it_is_allowed_by_name(
    tmp_path: Path,
) -> None:
    run = training(tmp_path, "one", *OFTEN)
    stopped(run, 3, signal.SIGKILL, 4, rank=0)
    allowed = training(tmp_path, "one", *OFTEN, "distributed.should_allow_other_num_processes=true")
    assert started(allowed, 2).finish() == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("experiment", "code", "told"),
    [
        ("CountsCalls", 2, "ranks 1, 2 have other state_dict() of the experiment than rank 0"),
        ("OtherData", 2, "in data_fingerprint: '"),
        ("OtherSettings", 2, "in config.experiment.width: "),
        ("FailsOnOne", 1, "rank 2: "),
    ],
)
def test_what_goes_wrong_on_one_rank_ends_all_with_one_line(
    tmp_path: Path, experiment: str, code: int, told: str
) -> None:
    run = training(tmp_path, "one", *SHARDED, experiment=experiment)
    start_s = time.monotonic()
    found, line = failed(run, 3)
    assert found == code
    assert told in line
    assert time.monotonic() - start_s < 120
    if experiment == "FailsOnOne":
        assert "this one sample" in line
        [record] = read_segments(run.run)
        assert record.error is not None
        assert "rank 2: ValueError: this one sample" in record.error.message


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_hangs_or_dies_ends_all_in_time(tmp_path: Path, number: signal.Signals) -> None:
    overrides = (*SHARDED, *LONG, "distributed.hang_timeout_s=30")
    run = training(tmp_path, "one", *overrides)
    segment = started(run, 3)
    ranks = segment.wait_for("ranks")
    assert ranks is not None
    for _ in range(3):  # steps are done
        assert segment.wait_for("progress") is not None, "".join(segment.errors)
    pids = ranks["pids"]
    assert isinstance(pids, list)
    os.kill(pids[2], number)
    start_s = time.monotonic()
    assert segment.finish() == 1
    assert time.monotonic() - start_s < 30 + 90
    errors = "".join(segment.errors)
    if number == signal.SIGSTOP:
        assert "nothing new has happened for" in errors
        assert "[rank 1] " in errors  # where it stood
        assert "all_to_all_single" in errors or "wait" in errors
    else:
        assert f"rank 2 (process {pids[2]}) was ended by SIGKILL" in errors
    assert all(not Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_launcher_that_is_killed_leaves_no_rank_behind(tmp_path: Path) -> None:
    run = training(tmp_path, "one", *SHARDED, *LONG)
    segment = started(run, 3)
    ranks = segment.wait_for("ranks")
    assert ranks is not None
    assert segment.wait_for("started") is not None, "".join(segment.errors)
    segment.kill(signal.SIGKILL)
    assert segment.finish() == -signal.SIGKILL
    pids = ranks["pids"]
    assert isinstance(pids, list)
    deadline_s = time.monotonic() + 10
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not [pid for pid in pids if _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["distributed.num_processes=2"], "needs a strategy"),
        (["distributed.num_shards=4"], "needs a strategy"),
        (
            ["distributed.strategy=ddp", "distributed.num_shards=2", "distributed.num_processes=3"],
            "num_processes=3 is more than num_shards=2",
        ),
        (["distributed.strategy=ddp", "distributed.num_shards=65"], "data.batch_size=64"),
        (["distributed.strategy=fsdp"], "data.should_drop_last=false does not go with"),
        (["distributed.strategy=zero"], "'none', 'ddp' or 'fsdp'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, overrides: list[str], told: str
) -> None:
    run = Training(tmp_path, "one", "digits", tuple(overrides))
    segment = run.start()
    assert segment.finish() == 2
    [line] = [line for line in segment.errors if line.startswith("error: ")]
    assert told in line
    assert not run.run.path.exists()


def test_defaults_leave_no_trace_in_what_a_checkpoint_says_of_its_configuration() -> None:
    from holdfast.training.configuration.loading import digested_values
    from holdfast.training.configuration.schema import RunConfig

    def digested(**values: object) -> object:
        config = RunConfig.model_validate({"distributed": values})
        return digested_values(config).get("distributed")

    assert digested() is None
    assert digested(hang_timeout_s=3.0) is None
    assert digested(strategy="ddp") == {"strategy": "ddp"}
    assert digested(strategy="ddp", num_processes=2) == {"strategy": "ddp", "num_processes": 2}
    sharded = digested(strategy="ddp", num_processes=2, num_shards=4)
    assert sharded == {"num_shards": 4} == digested(strategy="ddp", num_shards=4)
    assert json.dumps(sharded) == '{"num_shards": 4}'
