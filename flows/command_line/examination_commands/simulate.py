"""``holdfast simulate``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from holdfast.flows.command_line.options import EXIT_CODES, JSON_OPTION, STORE_OPTION
from holdfast.flows.command_line.stores import find_run, reading_store
from holdfast.training.checkpointing.policy import build_schedule
from holdfast.training.configuration.loading import resolve_config
from holdfast.training.configuration.option import SET_OPTION, NumberRange
from holdfast.training.configuration.schema import RunConfig, Section
from holdfast.training.errors import InputError
from holdfast.training.runs.directory import RunDirectory, read_run_record
from holdfast.training.runs.shown_text import shown
from holdfast.training.simulation.capacity import Capacity, read_trace
from holdfast.training.simulation.costs import RunCosts, costs_of, read_costs
from holdfast.training.simulation.study import (
    Study,
    Summary,
    exponential_starts,
    starts_in,
    study,
)

HELP = """Reckon what preemptions would cost a run, without training it.

RUN's records tell what its steps, saves and starts take; options take their place, and without
RUN they are all there is. Machines come and go as a trace says, or live exponentially. Shown are
the time to the end, the useful share of what is paid, the best interval between saves in hindsight
and how close the one that training finds for itself comes to it, and the money, where prices.* of
the configuration say what an hour costs.

A trace is a CSV file of rows such as 60000,add,node1: milliseconds (or what a first row says:
seconds,event,machine), add or remove, and a name.

\b
Examples:
  holdfast simulate digits-20260131-030000 --trace p3-trace.csv
  holdfast simulate first --mean-life-s 3600 --num-steps 500000 \\
      --set prices.spot_per_hour=0.92 --set prices.on_demand_per_hour=3.06
  holdfast simulate --mean-life-s 3600 --num-steps 100000 --step-s 0.5 --save-s 0.05 \\
      --durable-s 2 --start-s 15
"""
FIGURES = (
    *("finish", "fastest", "slowest", "useful share", "done again", "saving", "restarting"),
    *("waiting", "segments"),
)
SECONDS = NumberRange(min=0.0, max=1e9)
RECKONED_WITH = (
    *("checkpoint.every_epochs", "checkpoint.every_steps", "checkpoint.every_s"),
    *("checkpoint.is_auto", "checkpoint.max_overhead"),
    *("checkpoint.mean_time_between_preemptions_s", "preemption.grace_period_s"),
    *("prices.spot_per_hour", "prices.on_demand_per_hour", "prices.currency"),
)
"""Keys of the configuration that change what is told."""
COUNT = click.IntRange(min=1, max=10**12)
COSTS: dict[str, tuple[click.IntRange | NumberRange, str]] = {
    "num_steps": (COUNT, "Steps of the whole run; of RUN, those that it has done."),
    "step_s": (SECONDS, "Seconds of a step, with its share of validation."),
    "save_s": (SECONDS, "Seconds that a save takes from training."),
    "durable_s": (SECONDS, "Seconds until a save is durable."),
    "start_s": (SECONDS, "Seconds from a segment's beginning to its first step."),
    "takeover_s": (SECONDS, "Seconds until another machine has begun, after one that vanished."),
    "handover_s": (SECONDS, "The same after one that was told before, and saved."),
    "epoch_steps": (COUNT, "Save after so many steps, whatever the interval."),
}


def _cost_options(command: Callable[..., None]) -> Callable[..., None]:
    for name, (kind, told) in reversed(COSTS.items()):
        command = click.option(f"--{name.replace('_', '-')}", type=kind, help=told)(command)
    return command


@click.command(
    "simulate",
    help=HELP,
    epilog=EXIT_CODES,
    short_help="Reckon what preemptions would cost a run.",
)
@click.argument("run", required=False)
@click.option("--trace", type=click.Path(path_type=Path), help="CSV file of machines.")
@click.option(
    "--mean-life-s",
    type=NumberRange(min=0.0, max=1e9, min_open=True),
    help="Mean of exponential lives, in the trace's place.",
)
@click.option(
    "--notice-s",
    type=SECONDS,
    help="How long before their end machines are told. Unset: preemption.grace_period_s.",
)
@click.option(
    "--without-notice",
    type=NumberRange(0.0, 1.0),
    default=0.2,
    show_default=True,
    help="Share of machines that vanish without one.",
)
@click.option(
    "--num-starts",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="Runs, which begin at times spread evenly over the trace, or with draws of their own.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@_cost_options
@SET_OPTION
@STORE_OPTION
@JSON_OPTION
def command(
    run: str | None,
    overrides: tuple[str, ...],
    store: str,
    is_json: bool,
    **options: Any,
) -> None:
    """Reckon."""
    found = None if run is None else find_run(reading_store(store, run), run)
    config = _config(found, overrides)
    given = {name: options[name] for name in COSTS if options[name] is not None}
    if found is None:
        costs = costs_of(given, "the options")
    else:
        costs = read_costs(found, config.checkpoint.every_epochs, given)
    costs = costs.saved_every(config.checkpoint.every_steps)
    if options["notice_s"] is None:
        options["notice_s"] = config.preemption.grace_period_s
    told, starts = _machines(options)
    checkpoint = config.checkpoint
    done = study(
        costs,
        starts,
        build_schedule(checkpoint),
        checkpoint.mean_time_between_preemptions_s,
        config.prices,
    )
    if is_json:
        click.echo(json.dumps({"machines": told, "num_starts": len(starts), **done.as_json()}))
    else:
        click.echo(_page(done, told, len(starts)))


def _config(run: RunDirectory | None, overrides: tuple[str, ...]) -> RunConfig:
    """The run's configuration, without the settings of its experiment; the defaults without one."""
    resolved = {} if run is None else dict(read_run_record(run).config)
    resolved.pop("experiment", None)
    found = resolve_config(settings_class=Section, defaults=resolved, overrides=overrides)
    before = _values(resolve_config(settings_class=Section, defaults=resolved))
    for key, value in _values(found).items():
        if value != before[key] and key not in RECKONED_WITH:
            raise InputError(
                f"{key} is not reckoned with: leave it out, and give what it changes as an option; "
                f"allowed: {', '.join(RECKONED_WITH)}"
            )
    return found


def _values(config: RunConfig) -> dict[str, Any]:
    """Each of them by its key."""
    sections = {**config.model_dump(), "seed": {"": config.seed}}
    return {
        f"{section}.{name}".rstrip("."): value
        for section, values in sections.items()
        for name, value in values.items()
    }


def _machines(options: dict[str, Any]) -> tuple[str, list[Callable[[], Capacity]]]:
    """What the machines are, in words, and where each start has its own from."""
    notice_s, share, seed = options["notice_s"], options["without_notice"], options["seed"]
    trace_file, mean_s, num = options["trace"], options["mean_life_s"], options["num_starts"]
    if (trace_file is None) == (mean_s is None):
        raise InputError("machines come from --trace FILE or have --mean-life-s SECONDS: give one")
    notices = f"{notice_s:g} s of notice, {share:.0%} vanish without"
    if trace_file is None:
        starts = exponential_starts(mean_s, notice_s, share, seed, num)
        return f"lives of {_time(mean_s)} in the mean, exponential; {notices}", starts
    trace = read_trace(trace_file).spread(seed).with_notices(notice_s, share, seed)
    told = (
        f"{shown(trace_file.name)}, {len(trace.machines)} machines in {_time(trace.length_s)}, "
        f"median life {_time(trace.median_life_s)}; {notices}"
    )
    return told, starts_in(trace, num)


def _page(done: Study, machines: str, num_starts: int) -> str:
    lines = [
        f"run           {_costs(done.costs)}",
        f"machines      {machines}",
        f"starts        {num_starts}",
        "",
    ]
    if done.best.is_endless and done.found.is_endless:
        lines.append(
            "finish        never: no interval between saves gets to the end on such machines"
        )
        return "\n".join(lines)
    columns = [_figures(done.found), _figures(done.best)]
    lines.append(f"{'':<14}{'online interval':>18}{'best interval':>18}")
    lines += [f"{name:<14}{columns[0][name]:>18}{columns[1][name]:>18}" for name in FIGURES]
    lines += [
        "",
        f"best interval {_interval(done)}",
        f"closeness     {done.closeness:.1%} of the best interval's useful share",
    ]
    lines += [] if done.money is None else [f"money         {done.money.told()}"]
    return "\n".join(lines)


def _interval(done: Study) -> str:
    if math.isfinite(done.best_interval_s):
        return f"a save every {_time(done.best_interval_s)}"
    return "no save before the end" if done.costs.epoch_steps is None else "ends of epochs alone"


def _costs(costs: RunCosts) -> str:
    ends = "" if costs.epoch_steps is None else f", each {costs.epoch_steps:,} steps in any case"
    return (
        f"{costs.num_steps:,} steps of {_time(costs.step_s)}, {_time(costs.work_s)} in all; a save "
        f"takes {_time(costs.save_s)} and is durable after {_time(costs.durable_s)}{ends}; a start "
        f"takes {_time(costs.start_s)}, {_time(costs.takeover_s)} after a machine vanished, "
        f"{_time(costs.handover_s)} after a notice"
    )


def _figures(summary: Summary) -> dict[str, str]:
    mean = summary.mean
    if mean is None:
        return dict.fromkeys(FIGURES, "") | {"finish": "never"}
    return {
        "finish": _time(fmean(summary.finish_s)),
        "fastest": _time(summary.finish_s[0]),
        "slowest": _time(summary.finish_s[-1]),
        "useful share": f"{summary.useful_share:.2%}",
        "done again": _time(mean.recomputed_s),
        "saving": _time(mean.saving_s),
        "restarting": _time(mean.restarting_s),
        "waiting": _time(mean.waiting_s),
        "segments": f"{summary.total.num_segments / len(summary.finish_s):.1f}",
    }


def _time(seconds: float) -> str:
    """A length of time in the unit in which it is read most easily."""
    if seconds == 0 or math.isinf(seconds):
        return "0 s" if seconds == 0 else "unknown"
    sizes = ((172800.0, 86400.0, "d"), (7200.0, 3600.0, "h"), (180.0, 60.0, "min"))
    size, unit = next(((s, u) for least, s, u in sizes if seconds >= least), (1.0, "s"))
    if seconds < 0.1:
        size, unit = 1e-3, "ms"
    number = seconds / size
    return f"{number:,.0f} {unit}" if number >= 1000 else f"{number:.3g} {unit}"
