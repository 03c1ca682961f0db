"""``holdfast fork``, ``evaluate`` and ``checkpoints convert``, by name, with real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from holdfast.flows.command_line.group import exit_code_of
from tests.faults.campaign import Training, complete

EXPERIMENT = f"{Path(__file__).parents[1] / 'generality' / 'adapters.py'}:KeptLora"


@pytest.mark.slow
def test_a_run_is_scored_and_forked_by_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    complete(Training(tmp_path, "one", EXPERIMENT, ("train.num_epochs=2",)))
    at = ["--store", str(tmp_path)]
    assert exit_code_of(["evaluate", "one", "--step", "6", "--json", *at]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["metrics"] == found["recorded"]
    assert (found["step"], found["split"]) == (6, "validation")
    longer = ["--at", "latest", "--set", "train.num_epochs=3"]
    assert exit_code_of(["fork", "one", "adapters.KeptLora", *longer, *at]) == 0
    told = capfd.readouterr().out.splitlines()
    assert told[0].endswith("adapters.KeptLora begins with step 12 of one")
    assert told[1:] == ["  train.num_epochs = 3"]
    assert exit_code_of(["fork", "one", "other", "--at", "7", *at]) == 2
    errors = capfd.readouterr().err
    assert "has no checkpoint of step 7; there are those of 6 (full), 12 (full)" in errors
    assert errors.count("\n") == 1
    assert exit_code_of(["fork", "none", "other", "--at", "7", *at]) == 2
    assert "has no run 'none'" in capfd.readouterr().err


def test_an_old_file_is_converted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"module.a": torch.ones(2)}, "epoch": 3}, tmp_path / "old.pt")
    assert exit_code_of(["checkpoints", "convert", str(tmp_path / "old.pt")]) == 0
    assert "1 without module." in capfd.readouterr().out
    assert (tmp_path / "old.safetensors").is_file()
    assert exit_code_of(["checkpoints", "convert", str(tmp_path / "old.pt")]) == 2
    assert "is there already" in capfd.readouterr().err
