"""The fresh process behind ``checking.py``: ``parity`` or ``latency`` of artifacts on disk."""

from __future__ import annotations

import argparse
import gc
import sys
from functools import cache
from pathlib import Path

from holdfast.training.champion.latency import BATCH_SIZES, measure
from holdfast.training.configuration.schema import Json
from holdfast.training.exactness.reproducibility import set_up_torch
from holdfast.training.experiment.protocol import Experiment
from holdfast.training.export.formats import formats
from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.interfaces import open_interface
from holdfast.training.export.parts import graph_of
from holdfast.training.export.protocol import Place
from holdfast.training.export.specification import Inputs
from holdfast.training.export.weights import load_champion
from holdfast.training.parity.assembly import PartChecks
from holdfast.training.parity.champion import Answers, Champion
from holdfast.training.parity.checking import CheckRequest, read_request
from holdfast.training.parity.golden import write_golden
from holdfast.training.parity.parity import (
    Int8Limits,
    check_artifact,
    check_comparison,
)
from holdfast.training.parity.ranges import RANGES, write_ranges
from holdfast.training.runs.durable_json import write_json_durably


def main() -> None:
    """Judge the named artifacts of a request, one after the other."""
    parser = argparse.ArgumentParser(prog="checking_process")
    parser.add_argument("action", choices=("parity", "latency"))
    parser.add_argument("request", type=Path)
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    request = read_request(arguments.request)
    set_up_torch("deterministic", request.num_threads)
    if arguments.action == "parity":
        check_parity(request, arguments.names)
    else:
        check_latency(request, arguments.names)


def check_parity(request: CheckRequest, names: list[str]) -> None:
    """Write a report for each name; ``champion`` stands for the comparison itself."""
    experiment, config = request.build_experiment(), request.build_config()
    batch_size, num_golden = config.data.evaluation_batch_size, config.export.num_golden
    folders = Path(request.bundle), Path(request.scratch)
    parts = PartChecks(experiment, Path(request.champion), folders, batch_size, num_golden)
    answers = _champion_answers(request, experiment, is_checked="champion" in names)
    place = Place(*folders, experiment.model, answers.interface)
    table = formats()
    limits = Int8Limits(
        config.export.int8_metric or config.selection.metric,
        config.export.int8_max_metric_change,
        config.export.int8_min_agreement,
    )
    for name in names:
        gc.collect()  # models are in cycles: each would be there while the next one is checked
        if name == "champion":
            continue
        _say(f"parity of {name}")
        if name in request.parts:
            report = parts.check(name)
        else:
            report = check_artifact(answers, name, table[name], place, limits)
        write_json_durably(request.report_path("parity", name), report.as_json())


def _champion_answers(request: CheckRequest, experiment: Experiment, is_checked: bool) -> Answers:
    """What artifacts are held to; where ``is_checked``, with the report of the comparison itself.

    The model goes: with the champion's and an artifact's in memory, a runtime that loads one in
    several copies would take more than anything else.
    """
    config, scratch = request.build_config(), Path(request.scratch)
    batch_size = config.data.evaluation_batch_size
    champion = Champion.load(experiment, Path(request.champion), batch_size, _say)
    if is_checked:
        _say("parity of champion")
        report = check_comparison(champion)
        write_golden(scratch / "golden", champion, config.export.num_golden)
        _say("ranges of validation data")
        write_ranges(scratch / RANGES, champion)
        write_json_durably(request.report_path("parity", "champion"), report.as_json())
    return champion.answers()


def check_latency(request: CheckRequest, names: list[str]) -> None:
    """Write p50 and p99 of each artifact, and of eager PyTorch measured beside it."""
    whole, champion = request.build_experiment(), Path(request.champion)
    num_runs = request.build_config().export.num_latency_runs

    @cache
    def opened(part: str) -> tuple[Inputs, Place]:
        folders = Path(request.bundle), Path(request.scratch)
        experiment, folders = graph_of(whole, part, champion, folders)
        model = load_champion(champion, experiment.model())
        found = open_interface(experiment, model, max(BATCH_SIZES))
        return found.rows, Place(*folders, experiment.model, found.interface)

    def measured(name: str) -> dict[str, Json]:
        part, _, form = name.rpartition(".")
        rows, place = opened(part)
        artifact = formats()[form].load(place)  # first: a runtime may load it in several copies
        model = load_champion(champion, place.build())
        eager = GuardedModel(model, place.interface.form).eval()
        return measure(artifact.run, lambda inputs: list(eager(*inputs)), rows, num_runs)

    for name in names:
        _say(f"latency of {name}")
        write_json_durably(request.report_path("latency", name), measured(name))
        gc.collect()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
