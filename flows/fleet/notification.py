"""Who is told of runs: a webhook, and the automations of Prefect that call it.

The server calls the webhook itself, so somebody is told even where the machine of a run is gone.
The body is ``{"text": ...}``, which Slack, Mattermost, Teams' workflows and others take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from holdfast.tasks.news import KEPT_OUT, PREFIX, PROMOTED, STUCK
from holdfast.training.errors import InputError

if TYPE_CHECKING:
    from prefect.events.schemas.automations import AutomationCore

BLOCK = "holdfast-notify"
FAILED = "holdfast: a run failed for good"
NEWS = "holdfast: a run is stuck, was promoted or kept out"
FLOW = "training-pipeline"
OF_FAILURE = (
    '{"text": {{ ("holdfast: " ~ flow_run.name ~ " failed: " ~ flow_run.state.message) | tojson }}}'
)
OF_NEWS = (
    '{"text": {{ ("holdfast: " ~ event.resource.name ~ " " ~ event.payload.message) | tojson }}}'
)


def notify(url: str) -> list[str]:
    """Have the server call a webhook for news of runs. May be repeated, also with another URL.

    Returns the names of the automations. Raises InputError where this is no URL.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise InputError(f"--notify-url {url} is not a URL; expected https://host/path")
    from prefect.client.orchestration import get_client

    block_id = _save_webhook(url)
    with get_client(sync_client=True) as client:
        for automation in _automations(block_id):
            known = client.read_automations_by_name(automation.name)
            if known:
                client.update_automation(known[0].id, automation)
            else:
                client.create_automation(automation)
    return [FAILED, NEWS]


def _save_webhook(url: str) -> Any:
    """The id of the block that keeps the address, as a secret."""
    from prefect.blocks.webhook import Webhook

    headers: Any = {"Content-Type": "application/json"}
    block = Webhook(method="POST", url=url, headers=headers)
    return block.save(BLOCK, overwrite=True, _sync=True)  # type: ignore[call-arg]


def _automations(block_id: Any) -> list[AutomationCore]:
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

    failed: dict[str, Any] = {
        "expect": {"prefect.flow-run.Failed"},
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": {"prefect.resource.role": "flow", "prefect.resource.name": FLOW},
    }
    news: dict[str, Any] = {
        "expect": {STUCK, PROMOTED, KEPT_OUT},
        "match": {"prefect.resource.id": f"{PREFIX}*"},
    }
    return [
        AutomationCore(
            name=name,
            description="Made by `holdfast deploy --notify-url`.",
            trigger=EventTrigger(posture="Reactive", threshold=1, within=0, **trigger),
            actions=[CallWebhook(block_document_id=block_id, payload=payload)],
        )
        for name, trigger, payload in ((FAILED, failed, OF_FAILURE), (NEWS, news, OF_NEWS))
    ]
