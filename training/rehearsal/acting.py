"""The process of a rehearsal: ``python -P -m holdfast.training.rehearsal.acting REQUEST``.

It builds what a segment would build, in a folder to throw away, tries one thing after another, and
tells what it finds. It ends when its standard input ends: its parent is gone then.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.training.rehearsal.request import (
    DEFAULT_DEPTH,
    RehearsalRequest,
    resolved_depth,
    tell,
)
from holdfast.training.rehearsal.telling import Telling

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import RunConfig
    from holdfast.training.rehearsal.trial import Trial

RUN_ID = "rehearsal"
BUILD, STEPS, RESUME = "data and model", "two steps", "save and restore"
WEIGHTS, SIGNATURE = "weights alone", "signature"


@dataclass(frozen=True)
class Act:
    """One thing to try.

    Attributes:
        needs: names of acts without whose success it makes no sense.
    """

    name: str
    run: Callable[[], None]
    needs: tuple[str, ...] = (STEPS,)


def main() -> None:
    """Rehearse what the request asks for."""
    request = RehearsalRequest.read(Path(sys.argv[1]))
    threading.Thread(target=_end_with_parent, name="holdfast-parent", daemon=True).start()
    telling = Telling(request)
    sys.path += [folder for folder in request.search_path if folder not in sys.path]
    try:
        with ExitStack() as stack:
            perform(request, telling, stack)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the process boundary
        telling.fail(error)
    tell(request.told, "end")


def perform(request: RehearsalRequest, telling: Telling, stack: ExitStack) -> None:
    """All acts, one after the other; what is opened for them is closed by ``stack``."""
    from holdfast.training.rehearsal.trial import Trial
    from holdfast.training.stage import StageArguments, resolve_arguments

    arguments = StageArguments(
        experiment=request.experiment,
        store=Path(request.folder) / "store",
        run_id=RUN_ID,
        num_threads=request.num_threads,
        config_file=None if request.config_file is None else Path(request.config_file),
        # Notices are the parent's.
        overrides=(*request.overrides, "preemption.sources=[]"),
        progress_format="none",
    )
    config, _ = resolve_arguments(arguments)
    acts = planned(Trial(arguments, request, telling, stack), config, request)
    names = [act.name for act in acts]
    tell(request.told, "plan", acts=names, max_s=config.rehearsal.max_s)
    gone_well: set[str] = set()
    for number, act in enumerate(acts):
        if gone_well.issuperset(act.needs) and _has_gone_well(act, number, len(acts), telling):
            gone_well.add(act.name)


def planned(trial: Trial, config: RunConfig, request: RehearsalRequest) -> Sequence[Act]:
    """The acts of the asked depth, those that the others need first."""
    from holdfast.training.export.artifacts import chosen_formats
    from holdfast.training.rehearsal.exporting import Exporting

    depth = resolved_depth(request.depth or config.rehearsal.depth)
    if depth == "none":  # who asks for a rehearsal wants one
        depth = DEFAULT_DEPTH
    acts = [
        Act(BUILD, trial.build, needs=()),
        Act(STEPS, trial.train, needs=(BUILD,)),
        Act(RESUME, trial.resume),
        Act("snapshot beside", trial.compare_snapshots, needs=(RESUME,)),
        Act("validation", trial.validate),
        Act("batch norm", trial.recompute_batch_norm),
        Act(WEIGHTS, trial.load_weights, needs=(RESUME,)),
        Act("last batch", trial.train_last),
        Act("later epoch", trial.fetch_later),
        Act("cost", trial.estimate),
    ]
    if depth == "step":
        return acts
    exporting = Exporting(trial, config.export)
    acts.append(Act(SIGNATURE, exporting.open, needs=(WEIGHTS,)))
    for name in chosen_formats(config.export):
        acts.append(Act(f"export {name}", exporting.act(name), needs=(SIGNATURE,)))
    return [*acts, Act("export parts", exporting.try_parts, needs=(SIGNATURE,))]


def _has_gone_well(act: Act, number: int, total: int, telling: Telling) -> bool:
    """Try one act, and tell what it raises."""
    telling.act, start_s = act.name, time.monotonic()
    told = telling.request.told
    tell(told, "act", name=act.name, number=number, total=total)
    try:
        act.run()
    except (Exception, SystemExit) as error:  # noqa: BLE001  # each is a finding
        telling.fail(error)
        return False
    tell(told, "done", name=act.name, duration_s=round(time.monotonic() - start_s, 2))
    return True


def _end_with_parent() -> None:
    """Wait for the end of standard input, which the parent holds open as long as it lives."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
