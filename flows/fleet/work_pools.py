"""Work pools of the configured Prefect server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from holdfast.training.configuration.loading import nearest
from holdfast.training.errors import InputError


def pool_type(name: str) -> str | None:
    """The type of a work pool; None where there is none of that name."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return str(client.read_work_pool(name).type)
        except ObjectNotFound:
            return None


def require_pool(name: str) -> str:
    """The type of a work pool. Raises InputError that names those that there are."""
    found = pool_type(name)
    if found is None:
        names = _pool_names()
        raise InputError(
            f"there is no work pool {name!r} on this server; "
            f"{nearest(name, names) if names else 'there are none'}; "
            f"holdfast deploy --pool {name} makes it"
        )
    return found


def ensure_pool(name: str, kind: str, definition: Path) -> bool:
    """Make the work pool unless it is there; whether it was made.

    An existing pool is left as it is: its job template may have been adapted.

    Raises:
        InputError: it exists with another type, or the definition cannot be read.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    existing = pool_type(name)
    if existing == kind:
        return False
    if existing is not None:
        raise InputError(
            f"work pool {name!r} is of type {existing}, not {kind}; name another with --pool"
        )
    pool = WorkPoolCreate(name=name, type=kind, base_job_template=_read(definition))
    with get_client(sync_client=True) as client:
        client.create_work_pool(pool)
    return True


def _pool_names() -> list[str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return [pool.name for pool in client.read_work_pools()]


def _read(definition: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(definition.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"work pool definition {definition} cannot be read: {error}") from error
