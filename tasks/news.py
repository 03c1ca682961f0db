"""News of runs, as events of Prefect, which automations can be made of.

``holdfast.run.promoted``, ``holdfast.run.kept-out`` and ``holdfast.run.stuck``; that a flow run has
failed for good is an event of Prefect's own. Each event's payload has a ``message`` for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.training.bundles.summary import promotion_line, published_name

PREFIX = "holdfast.run."
PROMOTED, KEPT_OUT, STUCK = f"{PREFIX}promoted", f"{PREFIX}kept-out", f"{PREFIX}stuck"


def tell_of_promotion(run: str, promotion: Mapping[str, Any]) -> None:
    """A run's bundle became the champion, or did not."""
    event = PROMOTED if promotion["is_promoted"] else KEPT_OUT
    tell(event, run, f"{published_name(promotion)} {promotion_line(promotion)}")


def tell_of_stuck(run: str, reason: str) -> None:
    """A run that nobody will take up again by itself."""
    tell(STUCK, run, f"stays crashed: {reason}")


def tell(event: str, run: str, message: str) -> None:
    """Hand an event over to Prefect's own thread, which sends it."""
    from prefect.events import emit_event

    resource = {"prefect.resource.id": f"{PREFIX}{run}", "prefect.resource.name": run}
    emit_event(event=event, resource=resource, payload={"message": message})
