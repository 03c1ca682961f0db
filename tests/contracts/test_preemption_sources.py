"""One battery for every source of notices. The services are real HTTP servers on loopback."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from holdfast.training.configuration.schema import PreemptionConfig
from holdfast.training.errors import ConfigError
from holdfast.training.preemption.notices import Notice, PreemptionMonitor
from holdfast.training.preemption.sources import SOURCES, build_sources
from tests.training.preemption.watching import WAIT_S, config, eventually, monitoring, notice_of

CLOUDS = ("aws", "gcp", "azure")


ACTION = "/latest/meta-data/spot/instance-action"


REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


PREEMPTED = "/computeMetadata/v1/instance/preempted"


EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"


NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"


@dataclass
class Service:
    """The metadata services of the three clouds at one address.

    AWS wants a token that it gave out and that has not expired; GCP and Azure want their header.
    """

    url: str = ""
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    delay_s: float = 0.0
    is_broken: bool = False

    def set_json(self, path: str, value: object) -> None:
        self.answers[path] = (200, json.dumps(value).encode())

    def respond(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        self.requests.append(f"{method} {path}")
        if method == "PUT" and path == "/latest/api/token":
            is_valid = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "").isdecimal()
            self.tokens.add(token := f"token-{len(self.requests)}")
            return (200, token.encode()) if is_valid else (400, b"")
        if path.startswith("/latest/") and headers.get("x-aws-ec2-metadata-token") not in (
            self.tokens
        ):
            return 401, b"Unauthorized"
        if path.startswith("/computeMetadata") and headers.get("metadata-flavor") != "Google":
            return 403, b""
        if path.startswith("/metadata/") and headers.get("metadata") != "true":
            return 400, b""
        return self.answers.get(path, (404, b"<html>Not Found</html>"))


@pytest.fixture
def service() -> Iterator[Service]:
    state = Service()
    state.answers[PREEMPTED] = (200, b"FALSE")
    state.set_json(EVENTS, {"DocumentIncarnation": 1, "Events": []})
    with serving(state) as state.url:
        yield state


@contextmanager
def serving(state: Service) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            time.sleep(state.delay_s)
            headers = {key.lower(): value for key, value in self.headers.items()}
            status, body = state.respond(self.command, self.path, headers)
            if state.is_broken:
                self.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = answer

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def utc(seconds_ahead: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds_ahead)


@dataclass
class Trigger:
    """How a test makes the machine of a source go away."""

    config: PreemptionConfig
    fire: Callable[[], None]
    remaining_s: float


def build_trigger(name: str, service: Service, folder: Path, patch: pytest.MonkeyPatch) -> Trigger:
    sentinel = folder / "leave"
    cloud = config(name, metadata_url=service.url) if name in CLOUDS else config("signal")
    event = {"EventType": "Preempt", "NotBefore": format_datetime(utc(30), usegmt=True)}
    if name == "slurm":
        patch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 31))
    triggers: dict[str, Callable[[], Trigger]] = {
        "signal": lambda: Trigger(cloud, lambda: os.kill(os.getpid(), signal.SIGTERM), 30),
        "slurm": lambda: Trigger(config("slurm"), lambda: None, 30),
        "wall_time": lambda: Trigger(config("wall_time", max_wall_time_s=0.4), lambda: None, 30),
        "sentinel": lambda: Trigger(config("sentinel", sentinel_file=sentinel), sentinel.touch, 30),
        "aws": lambda: Trigger(
            cloud,
            lambda: service.set_json(
                ACTION, {"action": "terminate", "time": f"{utc(120):%Y-%m-%dT%H:%M:%SZ}"}
            ),
            120,
        ),
        "gcp": lambda: Trigger(
            cloud, lambda: service.answers.update({PREEMPTED: (200, b"TRUE")}), 30
        ),
        "azure": lambda: Trigger(cloud, lambda: service.set_json(EVENTS, {"Events": [event]}), 30),
    }
    return triggers[name]()


@pytest.fixture(params=sorted(SOURCES))
def trigger(
    request: pytest.FixtureRequest,
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Trigger:
    return build_trigger(request.param, service, tmp_path, monkeypatch)


def test_every_source_gives_one_typed_notice_with_a_deadline(
    trigger: Trigger, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["trigger"]
    with monitoring(trigger.config) as monitor:
        trigger.fire()
        notice = notice_of(monitor)
        assert notice.source == name
        assert notice.reason != ""
        assert not notice.is_advance
        remaining_s = notice.remaining_s(time.monotonic())
        assert remaining_s is not None
        assert trigger.remaining_s - WAIT_S < remaining_s <= trigger.remaining_s + 1.0


def test_every_source_is_silent_before_and_after(trigger: Trigger) -> None:
    with monitoring(trigger.config) as monitor:
        time.sleep(0.05)
        assert monitor.notice is None
    assert monitor.take_advance() is None
    names = [thread.name for thread in threading.enumerate() if not thread.daemon]
    assert not [name for name in names if name.startswith("holdfast-")]


def test_two_sources_of_one_kind_do_not_disturb_each_other(trigger: Trigger) -> None:
    with (
        PreemptionMonitor(build_sources(trigger.config)) as first,
        monitoring(trigger.config) as second,
    ):
        trigger.fire()
        assert notice_of(first).source == notice_of(second).source


def test_aws_reads_nothing_without_a_token_and_asks_for_one_token_only(service: Service) -> None:
    with monitoring(config("aws", metadata_url=service.url)) as monitor:
        eventually(lambda: len(service.requests) > 8)
        assert monitor.notice is None
    assert service.requests[0] == "PUT /latest/api/token"
    assert sum(request.startswith("PUT") for request in service.requests) == 1


def test_aws_gets_a_new_token_when_the_old_one_expires(service: Service) -> None:
    with monitoring(config("aws", metadata_url=service.url)) as monitor:
        eventually(lambda: len(service.requests) > 3)
        service.tokens.clear()
        service.set_json(ACTION, {"action": "stop", "time": "2030-01-01T00:00:00Z"})
        assert notice_of(monitor).reason == "spot instance: stop"


@pytest.mark.parametrize("when", [None, "", "soon", 7])
def test_aws_without_a_usable_time_takes_the_grace_period(service: Service, when: object) -> None:
    service.set_json(ACTION, {"action": "hibernate", "time": when})
    with monitoring(config("aws", metadata_url=service.url)) as monitor:
        remaining_s = notice_of(monitor).remaining_s(time.monotonic())
        assert remaining_s is not None
        assert 20 < remaining_s <= 30


def test_aws_rebalance_only_brings_the_next_save_forward_once(service: Service) -> None:
    service.set_json(REBALANCE, {"noticeTime": "2030-01-01T00:00:00Z"})
    with monitoring(config("aws", metadata_url=service.url)) as monitor:
        advances: list[Notice | None] = []
        eventually(lambda: advances.append(monitor.take_advance()) or advances[-1])
        assert advances[-1] is not None
        assert advances[-1].is_advance
        eventually(lambda: len(service.requests) > 12)
        assert monitor.take_advance() is None
        assert monitor.notice is None
        service.set_json(ACTION, {"action": "terminate", "time": "2030-01-01T00:00:00Z"})
        assert notice_of(monitor).reason == "spot instance: terminate"


def test_azure_ignores_other_events_and_events_of_other_machines(service: Service) -> None:
    service.answers[NAME] = (200, b"vm_1")
    others = [
        {"EventType": "Reboot", "Resources": ["vm_1"]},
        {"EventType": "Preempt", "Resources": ["vm_0", "vm_10"], "EventId": "theirs"},
    ]
    ours = {"EventType": "Preempt", "Resources": ["vm_0", "vm_1"], "EventId": "ours"}
    service.set_json(EVENTS, {"Events": others})
    with monitoring(config("azure", metadata_url=service.url)) as monitor:
        eventually(lambda: len(service.requests) > 4)
        assert monitor.notice is None
        service.set_json(EVENTS, {"Events": [*others, {**ours, "NotBefore": ""}]})
        assert notice_of(monitor).reason == "scheduled event Preempt ours"


def test_azure_heeds_every_preemption_where_its_own_name_is_unknown(service: Service) -> None:
    service.set_json(EVENTS, {"Events": [{"EventType": "Preempt", "Resources": ["vm_7"]}]})
    with monitoring(config("azure", metadata_url=service.url)) as monitor:
        notice_of(monitor)


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    "answer", [(500, b""), (200, b"\xff{"), (200, b"[]"), (200, b""), (301, b""), (200, b'{"a":1}')]
)
def test_a_senseless_answer_is_no_notice_and_is_told_once(
    service: Service, name: str, answer: tuple[int, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    service.answers.update(dict.fromkeys((ACTION, PREEMPTED, EVENTS), answer))
    with (
        caplog.at_level(logging.INFO),
        monitoring(config(name, metadata_url=service.url, poll_interval_s=0.01)) as monitor,
    ):
        eventually(lambda: len(service.requests) > 4)
        assert monitor.notice is None
    assert len(caplog.records) == 1
    assert f"from {name}" in caplog.text


@pytest.mark.parametrize("name", CLOUDS)
def test_a_service_that_speaks_no_http_is_no_notice(
    service: Service, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    service.is_broken = True
    with monitoring(config(name, metadata_url=service.url)) as monitor:
        eventually(lambda: len(service.requests) > 2)
        assert monitor.notice is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", CLOUDS)
def test_a_refused_connection_is_told_once_and_a_later_notice_is_heard(
    service: Service, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with (
        caplog.at_level(logging.INFO),
        monitoring(config(name, metadata_url=f"http://127.0.0.1:{port}")) as monitor,
    ):
        eventually(lambda: caplog.records)
        time.sleep(0.1)
        assert monitor.notice is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("name", CLOUDS)
def test_a_service_that_hangs_does_not_keep_a_segment_from_ending(
    service: Service, name: str
) -> None:
    service.delay_s = 5.0
    begin_s = time.monotonic()
    with monitoring(config(name, metadata_url=service.url)) as monitor:
        time.sleep(0.05)
        assert monitor.notice is None
    assert time.monotonic() - begin_s < 3.0


@pytest.mark.parametrize(
    "url", ["169.254.169.254", "https://h", "http://", "http://h:port", "http://[", "file:///x"]
)
@pytest.mark.parametrize("name", CLOUDS)
def test_a_senseless_address_is_refused(name: str, url: str) -> None:
    with pytest.raises(ConfigError, match="http://host:port"):
        build_sources(config(name, metadata_url=url))


def test_proxies_are_never_asked(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    service.answers[PREEMPTED] = (200, b"TRUE")
    with monitoring(config("gcp", metadata_url=service.url)) as monitor:
        notice_of(monitor)
