"""The stage ``export`` of a small experiment, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from holdfast.training.bundles import consumer
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.stage import Stage, StageArguments, prepared_stage
from tests.warm_start import WarmProcess

REFERENCE = f"{Path(__file__).parents[1] / 'export' / 'export_experiments.py'}:Pictures"
FORMATS = '["weights","onnx","torchscript","exported_program","onnx_int8"]'
TIMEOUT_S = 240.0
OVERRIDES = (
    f"export.formats={FORMATS}",
    "export.num_latency_runs=10",
    "data.evaluation_batch_size=32",
)


def choose(stage: Stage, is_fit_for_int8: bool = True) -> Path:
    """What the evaluation leaves: a candidate, and its row as the champion."""
    folder = stage.run.candidates / "best"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    torch.manual_seed(1)
    # The seeded model() of a run is one of those that int8 takes far away.
    seeded = stage.experiment.model
    model = type(stage.experiment).model(stage.experiment) if is_fit_for_int8 else seeded()
    save_file(model.state_dict(), path)
    write_json_durably(
        stage.run.evaluation_json,
        {
            "champion": {
                "digest": consumer.file_digest(path),
                "metrics": {"loss": 1.0},
                "name": "best",
                "path": "candidates/best/model.safetensors",
            }
        },
    )
    return path


def arguments(store: Path, *overrides: str) -> StageArguments:
    return StageArguments(
        experiment=REFERENCE,
        store=store,
        run_id="first",
        num_threads=1,
        overrides=(*OVERRIDES, *overrides),
        progress_format="none",
    )


def export(store: Path) -> Path:
    with prepared_stage(arguments(store)) as stage:
        choose(stage)
    words = [word for override in OVERRIDES for word in ("--set", override)]
    command = ["export", "--experiment", REFERENCE, "--store", str(store), "--run-id", "first"]
    process = WarmProcess([*command, *words], child_environment(1))
    _, errors = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, errors
    return stage.run.bundle
