"""Questions to the metadata services of AWS, GCP and Azure.

Each question is one call: it returns the notices that hold now, and raises OSError where the
service gave no usable answer. Only the standard library is used, proxies are never asked (the
addresses are link-local), and no answer is read beyond 64 KiB.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from holdfast.training.errors import ConfigError
from holdfast.training.preemption.notices import Notice, monotonic_time

LINK_LOCAL_URL = "http://169.254.169.254"
GCP_URL = "http://metadata.google.internal"
TIMEOUT_S = 2.0
MAX_ANSWER_BYTES = 64 * 1024
AWS_TOKEN_TTL_S = 21600
GCP_GRACE_S = 30.0


@dataclass(frozen=True)
class Answer:
    """Status and body of an HTTP answer."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body as JSON. Raises OSError where it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise OSError(f"answered {self.body[:60]!r}, which is not JSON: {error}") from error


class MetadataService:
    """HTTP requests to one address.

    Args:
        url: ``http://host[:port][/prefix]``. Raises ConfigError for anything else.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise _url_error(url) from error
        if parts.scheme != "http" or not self._host:
            raise _url_error(url)
        self._prefix = parts.path.rstrip("/")

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        """One request. Raises OSError where no answer came within two seconds."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            try:
                connection.request(method, self._prefix + path, headers=dict(headers))
                response = connection.getresponse()
                return Answer(response.status, response.read(MAX_ANSWER_BYTES))
            except http.client.HTTPException as error:
                raise OSError(f"{method} {path} was answered with no HTTP: {error!r}") from error

    def get(self, path: str, headers: Mapping[str, str]) -> Answer | None:
        """The answer 200; None for 404. Raises OSError for any other."""
        return accepted(path, self.request("GET", path, headers))


def accepted(path: str, answer: Answer) -> Answer | None:
    """An answer 200 as it is, None for 404. Raises OSError for any other."""
    if answer.status == http.client.NOT_FOUND:
        return None
    if answer.status != http.client.OK:
        raise OSError(f"GET {path} was answered with status {answer.status}, expected 200 or 404")
    return answer


class AwsQuestion:
    """EC2's instance metadata service, version 2: a token first, then what it says about spot.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """

    ACTION_PATH = "/latest/meta-data/spot/instance-action"
    REBALANCE_PATH = "/latest/meta-data/events/recommendations/rebalance"
    TOKEN_PATH = "/latest/api/token"

    def __init__(self, url: str | None, grace_period_s: float) -> None:
        self._service = MetadataService(url or LINK_LOCAL_URL)
        self._grace_period_s = grace_period_s
        self._token: str | None = None

    def __call__(self) -> Sequence[Notice]:
        """The interruption notice if there is one, otherwise the rebalance recommendation."""
        action = self._get(self.ACTION_PATH)
        if action is not None:
            return [self._interruption(_object(action.json()))]
        rebalance = self._get(self.REBALANCE_PATH)
        if rebalance is None:
            return []
        reason = f"rebalance recommended at {_object(rebalance.json()).get('noticeTime')}"
        return [Notice("aws", reason, deadline_s=None, is_advance=True)]

    def _interruption(self, action: dict[str, Any]) -> Notice:
        if not isinstance(action.get("action"), str):
            raise OSError(f"answered {action!r}, expected an object with 'action' and 'time'")
        deadline_s = _deadline(action.get("time"), datetime.fromisoformat)
        if deadline_s is None:
            deadline_s = time.monotonic() + self._grace_period_s
        return Notice("aws", f"spot instance: {action['action']}", deadline_s)

    def _get(self, path: str) -> Answer | None:
        answer = self._request(path)
        if answer.status == http.client.UNAUTHORIZED:
            self._token = None
            answer = self._request(path)
        return accepted(path, answer)

    def _request(self, path: str) -> Answer:
        if self._token is None:
            self._token = self._new_token()
        return self._service.request("GET", path, {"X-aws-ec2-metadata-token": self._token})

    def _new_token(self) -> str:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_TTL_S)}
        answer = self._service.request("PUT", self.TOKEN_PATH, ttl)
        token = answer.body.decode("ascii", errors="replace").strip()
        if answer.status != http.client.OK or not token.isprintable() or not token.isascii():
            raise OSError(f"PUT {self.TOKEN_PATH} was answered with status {answer.status}")
        return token


class GcpQuestion:
    """Compute Engine's metadata server: ``TRUE`` about half a minute before the end.

    https://cloud.google.com/compute/docs/instances/create-use-preemptible
    """

    PATH = "/computeMetadata/v1/instance/preempted"

    def __init__(self, url: str | None, grace_period_s: float) -> None:
        self._service = MetadataService(url or GCP_URL)
        self._grace_period_s = min(grace_period_s, GCP_GRACE_S)

    def __call__(self) -> Sequence[Notice]:
        """The notice, once the instance is being preempted."""
        answer = self._service.get(self.PATH, {"Metadata-Flavor": "Google"})
        text = b"FALSE" if answer is None else answer.body.strip().upper()
        if text not in (b"TRUE", b"FALSE"):
            raise OSError(f"GET {self.PATH} was answered {text[:60]!r}, expected TRUE or FALSE")
        if text == b"FALSE":
            return []
        deadline_s = time.monotonic() + self._grace_period_s
        return [Notice("gcp", "the instance is being preempted", deadline_s)]


class AzureQuestion:
    """Azure's Scheduled Events; those of type Preempt that concern this machine.

    A scale set tells each of its machines about the events of all of them.
    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
    """

    EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"
    NAME_PATH = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    HEADERS: Mapping[str, str] = {"Metadata": "true"}

    def __init__(self, url: str | None, grace_period_s: float) -> None:
        self._service = MetadataService(url or LINK_LOCAL_URL)
        self._grace_period_s = grace_period_s
        self._name: str | None = None

    def __call__(self) -> Sequence[Notice]:
        """The notice for the first Preempt event of this machine."""
        answer = self._service.get(self.EVENTS_PATH, self.HEADERS)
        events = [] if answer is None else _object(answer.json()).get("Events")
        if not isinstance(events, list):
            raise OSError(f"answered Events={events!r}, expected a list")
        for event in events:
            if _object(event).get("EventType") == "Preempt" and self._is_ours(event):
                return [self._notice(event)]
        return []

    def _notice(self, event: dict[str, Any]) -> Notice:
        deadline_s = _deadline(event.get("NotBefore"), parsedate_to_datetime)
        if deadline_s is None:  # empty once the event has begun
            deadline_s = time.monotonic() + self._grace_period_s
        return Notice("azure", f"scheduled event Preempt {event.get('EventId')}", deadline_s)

    def _is_ours(self, event: dict[str, Any]) -> bool:
        resources = event.get("Resources")
        if not isinstance(resources, list) or not resources:
            return True
        if self._name is None:
            self._name = self._own_name()
        # A stop without need costs a resume, a missed notice the work since the last checkpoint.
        return self._name == "" or self._name in resources

    def _own_name(self) -> str:
        try:
            answer = self._service.get(self.NAME_PATH, self.HEADERS)
        except OSError:
            return ""
        return "" if answer is None else answer.body.decode("utf-8", errors="replace").strip()


def _url_error(url: str) -> ConfigError:
    return ConfigError(
        f"preemption.metadata_url={url!r} is not an address of the form http://host:port; unset "
        f"it to take the cloud's own"
    )


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise OSError(f"answered {str(value)[:60]!r}, expected a JSON object")
    return value


def _deadline(text: object, parse: Callable[[str], datetime]) -> float | None:
    """Monotonic time of a date in an answer; None where it is missing or malformed."""
    if not isinstance(text, str) or not text:
        return None
    try:
        moment = parse(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return monotonic_time(moment.timestamp())
