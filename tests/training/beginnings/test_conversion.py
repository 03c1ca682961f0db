"""A training file of the usual kind: what is taken over, and why not the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import nn

from holdfast.training.checkpointing.commands import checkpoints
from holdfast.training.command_line import main


def run(*arguments: str) -> Result:
    assert "convert" in checkpoints.commands
    return CliRunner().invoke(main, ["checkpoints", "convert", *arguments])


def usual(path: Path) -> dict[str, torch.Tensor]:
    """What many scripts write, after one step."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {
        "model": wrapped,
        "optimizer": optimizer.state_dict(),
        "lr_sched": scheduler.state_dict(),
        "epoch": 7,
        "ema": model.state_dict(),
        "args": {"lr": 0.1},
    }
    torch.save(content, path)
    return model.state_dict()


def test_weights_are_written_and_all_else_is_told(tmp_path: Path) -> None:
    weights = usual(tmp_path / "old.pt")
    done = run(str(tmp_path / "old.pt"))
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "old.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    rows = {line.split()[0]: line for line in done.output.splitlines()}
    assert "7 tensors" in rows["model"]
    assert "7 without module. or _orig_mod." in rows["model"]
    assert "state of 4 parameters  not taken over" in " ".join(rows["optimizer"].split("   "))
    assert "[scheduler]" in rows["lr_sched"]
    assert "train.num_epochs" in rows["epoch"]
    assert "--entry ema" in rows["ema"]
    assert rows["args"].endswith("not taken over")
    assert "train.initial_weights=" in rows["wrote"]


def test_json_names_the_digest(tmp_path: Path) -> None:
    usual(tmp_path / "old.pt")
    target = tmp_path / "new.safetensors"
    done = run(str(tmp_path / "old.pt"), "--entry", "ema", "--to", str(target), "--json")
    told = json.loads(done.output)
    assert told["to"] == str(target)
    assert told["digest"].startswith("sha256:")
    assert [row["name"] for row in told["entries"] if row["is_taken"]] == ["ema"]


def test_a_plain_state_dict_is_taken_whole(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "_extra_state": {"n": 1}}, tmp_path / "old.pth")
    done = run(str(tmp_path / "old.pth"))
    assert done.exit_code == 0, done.output
    assert "(the whole file)  1 tensors" in done.output
    assert load_file(tmp_path / "old.safetensors").keys() == {"a"}


@pytest.mark.parametrize("kind", ["code", "there", "safetensors", "missing", "twice", "entry"])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    file, target, more = tmp_path / "old.pt", tmp_path / "new.safetensors", []
    content: object = {"a": torch.ones(1)}
    if kind == "code":
        content = nn.Linear(1, 1)
    elif kind == "there":
        target.write_text("mine")
    elif kind == "twice":
        content = {"a": torch.ones(1), "module.a": torch.ones(1)}
    elif kind == "entry":
        more = ["--entry", "best"]
    if kind == "safetensors":
        save_file({"a": torch.ones(1)}, file)
    elif kind != "missing":
        torch.save(content, file)
    before = sorted(tmp_path.iterdir())
    done = run(str(file), "--to", str(target), *more)
    assert done.exit_code == 2, done.output
    assert done.output.startswith("error: ")
    assert done.output.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
