"""The lease of a flow run's engine: one process drives a run, and others see that it lives.

The training child has the run's own lease, but between two children, while one starts, and after
the last one nobody holds it. The engine, which is the process that Prefect runs the flow in, takes
a second lease below ``<run>/.engine`` and keeps it from the first to the last task. It is renewed
every second, far more often than Prefect's heartbeat, and tells which attempt of
which flow run it belongs to.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from holdfast.training.errors import DataFormatError, LeaseError, LeaseLostError
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.runs.fenced import publish_json
from holdfast.training.runs.lease import Lease, LeaseView, read_lease
from holdfast.training.runs.process_identity import current_process
from holdfast.training.runs.stored_json import Kinds, Limits, read_json, required_fields

# A renewal that is eight times late is no hiccup of a disk any more: see docs/coming_back.md.
ENGINE_TTL_S = 8.0
HOLDER_NAME = "holder.json"
LIMITS = Limits(max_bytes=2**16, max_depth=4)
FIELDS: Kinds = {"generation": (int,), "flow_run_id": (str,), "run_count": (int,)}


@dataclass(frozen=True)
class Holder:
    """Which attempt of which flow run an engine works on.

    Attributes:
        generation: of the engine's lease.
        flow_run_id: Prefect's; empty without a server.
        run_count: how often Prefect had started that flow run.
    """

    generation: int
    flow_run_id: str
    run_count: int


def engine_directory(run: RunDirectory) -> RunDirectory:
    """Where the lease of a run's engine lies: a run directory within the run's."""
    return RunDirectory(run.path / ".engine")


@contextmanager
def engine_lease(
    run: RunDirectory, flow_run_id: str, run_count: int, *, wait_s: float
) -> Iterator[Lease]:
    """Be the one engine of a run while the block runs.

    A run that does not exist at the end, refused or not, leaves nothing behind.

    Raises:
        LeaseHeldError: another engine drives this run, and still did after ``wait_s``.
        StorageError: the store cannot be written.
    """
    engine, is_ours = engine_directory(run), False
    try:
        with Lease.acquire(engine, ENGINE_TTL_S, wait_s=wait_s) as lease:
            is_ours = True
            holder = Holder(lease.generation, flow_run_id, run_count)
            publish_json(lease, engine.path / HOLDER_NAME, asdict(holder))
            yield lease
    except LeaseError:  # another engine's by now
        is_ours = False
        raise
    finally:
        if is_ours and not run.run_json.exists():
            _remove(engine)
            with suppress(OSError):
                run.path.rmdir()


def _remove(engine: RunDirectory) -> None:
    """Delete what an engine makes, and nothing else that lies there."""
    for folder in (engine.lease, engine.staging):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        (engine.path / HOLDER_NAME).unlink(missing_ok=True)
        engine.path.rmdir()


def read_engine(run: RunDirectory) -> tuple[LeaseView, Holder] | None:
    """The newest engine of a run and what it works on; None where that is not known (yet).

    Raises StorageError: the disk does not answer.
    """
    engine = engine_directory(run)
    view = read_lease(engine)
    if view is None:
        return None
    try:
        path = engine.path / HOLDER_NAME
        told = required_fields(read_json(path, LIMITS), path, FIELDS)
    except (DataFormatError, FileNotFoundError):
        return None
    holder = Holder(**{name: told[name] for name in FIELDS})
    return (view, holder) if holder.generation == view.generation else None


def require_engine_is_here(run: RunDirectory) -> None:
    """Make sure that no other engine has taken the run over.

    Raises LeaseLostError: one has, since this one was presumed dead.
    """
    view = read_lease(engine_directory(run))
    if view is not None and view.process != current_process():
        raise LeaseLostError(
            f"{run.path} is driven by {view.holder} now; this flow run was presumed dead and "
            f"changes nothing any more"
        )
