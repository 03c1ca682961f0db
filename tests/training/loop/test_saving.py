"""When training saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.training.loop.segment import build_manager, build_saver, build_trainer
from holdfast.training.preemption.notices import Deliver, Notice, PreemptionMonitor
from holdfast.training.runs.costs import Costs
from holdfast.training.stage import StageArguments, prepared_stage
from tests.faults.campaign import HARD


class Announcing:
    """Says at once that the machine may go away later."""

    def start(self, deliver: Deliver) -> None:
        deliver(Notice("aws", "rebalance recommendation", None, is_advance=True))

    def stop(self) -> None:
        """There is nothing to stop."""


def test_an_advance_notice_brings_the_next_save_forward_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    arguments = StageArguments(HARD, tmp_path, "one", 1, overrides=("preemption.sources=[]",))
    with prepared_stage(arguments) as prepared, PreemptionMonitor([Announcing()]) as monitor:
        stage = replace(prepared, monitor=monitor)
        with stage.writing() as lease:
            trainer = build_trainer(stage, Costs())
            manager = build_manager(stage, trainer, lease, 1)
            saver = build_saver(stage, trainer, manager)
            trainer.train_step(next(trainer.steps()))
            saver.after_step()
            saver.finish()
            assert [info.step for info in manager.checkpoints()] == [1]
    [told] = [record.getMessage() for record in caplog.records if record.name.endswith("saving")]
    assert told == (
        "aws: rebalance recommendation; the next save is brought forward, and training goes on"
    )
