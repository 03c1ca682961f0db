"""Snapshots beside the computation have the bytes of those that are taken at once.

Whoever changes something without saying so changes what is saved.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast.training.averages.ema import MovingAverages
from holdfast.training.checkpointing.overlap import Overlap
from holdfast.training.errors import ExperimentError
from holdfast.training.loop import segment
from holdfast.training.stage import StageArguments, prepared_stage
from tests.training.late_stream import LateStream

EXPERIMENTS = Path(__file__).with_name("overlapped_experiments.py")


def saved(name: str, store: Path, *overrides: str) -> dict[str, bytes]:
    """The files of the checkpoints of all steps but for what tells when they were made."""
    every = ("checkpoint.every_steps=1", "checkpoint.keep_last=100", "train.num_epochs=1")
    asked = StageArguments(
        f"{EXPERIMENTS}:{name}",
        store,
        "one",
        1,
        overrides=(*every, *overrides),
        progress_format="none",
    )
    with prepared_stage(asked) as stage:
        assert segment.run_segment(stage).outcome == "completed"
        files = sorted(stage.run.checkpoints.glob("step-*/*s*t*"))
        found = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}
    return {path: content for path, content in found.items() if "manifest" not in path}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateStream:
    stream = LateStream()
    monkeypatch.setattr(segment, "copy_stream", lambda _: stream)
    return stream


CASES = [
    ("Normed", ("train.num_microbatches=2", "train.clip_norm=0.1")),
    ("Clipping", ("ema.decays=[0.9]",)),
]
SLOW_CASES = [
    ("Normed", ()),
    ("Closing", ()),
    ("Normed", ("scheduler.name=OneCycleLR", "scheduler.args={max_lr=0.1,total_steps=16}")),
    ("Scaling", ("checkpoint.weights_every_steps=3", "ema.decays=[0.9,0.5]")),
    ("Normed", ("train.should_compile=true",)),
]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # the compiler's
@pytest.mark.parametrize(
    ("name", "overrides"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_the_bytes_are_those_of_snapshots_that_are_taken_at_once(
    name: str, overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = saved(name, tmp_path / "at once", *overrides)
    stream = LateStream()
    monkeypatch.setattr(segment, "copy_stream", lambda _: stream)
    assert saved(name, tmp_path / "late", *overrides) == at_once
    num_saves = len({path.partition("/")[0] for path in at_once})
    assert len(stream.num_copied) == num_saves - 1


def unwatched(self: Overlap, optimizers: object) -> None:
    """Updates that nobody tells of."""


def unsaid(self: MovingAverages, model: torch.nn.Module, step: int) -> None:
    self.before_change = lambda: None
    UPDATE(self, model, step)


UPDATE = MovingAverages.update


@pytest.mark.parametrize(
    ("name", "owner", "method", "left_out", "wrong"),
    [
        ("Normed", Overlap, "watch", unwatched, {"optimizer"}),  # weights: it was learned
        ("Resting", MovingAverages, "update", unsaid, {"ema"}),
    ],
)
def test_a_wait_that_is_left_out_shows(
    name: str,
    owner: type,
    method: str,
    left_out: object,
    wrong: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once = saved(name, tmp_path / "at once")
    monkeypatch.setattr(segment, "copy_stream", lambda _: LateStream())
    monkeypatch.setattr(owner, method, left_out)
    spoiled = saved(name, tmp_path / "late")
    assert spoiled.keys() == at_once.keys()
    differing = {Path(path).stem for path in at_once if spoiled[path] != at_once[path]}
    assert differing == wrong


@pytest.mark.slow
def test_what_is_changed_elsewhere_is_copied_at_once(late: LateStream, tmp_path: Path) -> None:
    saved("Normed", tmp_path / "a")
    (num_all,) = {*late.num_copied}
    late.num_copied.clear()
    saved("Scaling", tmp_path / "b")
    assert {*late.num_copied} == {num_all - 1}


def test_what_is_changed_later_is_no_snapshot(
    late: LateStream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at_once = saved("ScalingOnce", tmp_path / "a", "checkpoint.should_overlap=false")
    assert not late.num_copied
    found = saved("ScalingOnce", tmp_path / "b")
    assert found == {path: at_once[path] for path in at_once if "step-00000006" not in path}
    (told,) = [record.message for record in caplog.records if "was changed" in record.message]
    assert told.startswith("0.weight was changed after step 6 before the next update, which the fi")
    with pytest.raises(ExperimentError, match=r"write checkpoint\.should_overlap=false$"):
        saved("ScalingOnce", tmp_path / "c", "checkpoint.weights_every_steps=3")
