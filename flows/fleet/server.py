"""The Prefect server that is configured, if one is. Importing this imports Prefect when asked."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime

from holdfast.training.errors import HoldfastError, InputError

SERVER_TIMEOUT_S = 10.0
LOOK_EVERY_S = 1.0


class ServerUnreachableError(HoldfastError):
    """The configured Prefect server does not answer."""


def configured_api_url() -> str | None:
    """Address of the server's API, from PREFECT_API_URL or Prefect's profile."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url or None


def require_server(wait_s: float = 0.0) -> str:
    """The API's address, once the server has answered there; a new one is given ``wait_s``.

    Raises:
        InputError: no server is configured.
        ServerUnreachableError: it does not answer.
    """
    api_url = configured_api_url()
    if api_url is None:
        raise InputError(
            "no Prefect server is configured; start one with `prefect server start`, then "
            "export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            server_time(api_url)
        except ServerUnreachableError:
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(LOOK_EVERY_S)
        else:
            return api_url


def server_time(api_url: str) -> float | None:
    """The server's clock in Unix seconds; None where it doesn't tell.

    Raises ServerUnreachableError.
    """
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=SERVER_TIMEOUT_S) as answer:
            told = answer.headers.get("Date")
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerUnreachableError(
            f"the Prefect server at {api_url} does not answer ({reason}); start it, or unset "
            "PREFECT_API_URL to run without one"
        ) from error
    return parsedate_to_datetime(told).timestamp() if told else None
