"""A real server calls a real webhook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import PrefectServer

PROMOTION = {"name": "digits", "version": 3, "alias": "champion", "reason": "0.2 better"}
TELL = """
import json, sys
from holdfast.tasks.news import tell_of_promotion, tell_of_stuck
from prefect.events.worker import EventsWorker
for promotion in json.loads(sys.argv[1]):
    tell_of_promotion("digits/one", promotion)
tell_of_stuck("digits/two", 'no worker: "crashed" 9 times')
EventsWorker.drain_all()
"""
FAIL = """
from prefect import flow
from holdfast.training.errors import HoldfastError

@flow(name="training-pipeline", flow_run_name="digits/three")
def training_pipeline():
    raise HoldfastError("the loss of step 3 is nan")

@flow(name="another")
def another():
    raise HoldfastError("none of ours")

for run in (another, training_pipeline):
    run(return_state=True)
"""


class Webhook(HTTPServer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Told)
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    def texts(self, num: int, timeout_s: float = 60.0) -> set[str]:
        deadline_s = time.monotonic() + timeout_s
        while len(self.bodies) < num and time.monotonic() < deadline_s:
            time.sleep(0.1)
        time.sleep(2)  # for what must not come
        return {body["text"] for body in self.bodies}


class Told(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Webhook)
        assert self.headers["Content-Type"] == "application/json"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(json.loads(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(server: PrefectServer, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        env={**server.environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_somebody_is_told_of_failed_stuck_promoted_and_kept_out_runs(
    prefect_server: PrefectServer, webhook: Webhook, tmp_path: Any
) -> None:
    deploy = ("-m", "holdfast", "deploy", "--pool", "told", "--store", str(tmp_path))
    for url in ("http://127.0.0.1:9/nobody", webhook.url):  # the later one counts
        told = run(prefect_server, *deploy, "--notify-url", url)
        assert told.count("calls the webhook") == 2
    promotions = [{**PROMOTION, "is_promoted": is_promoted} for is_promoted in (True, False)]
    run(prefect_server, "-c", TELL, json.dumps(promotions))
    run(prefect_server, "-c", FAIL)
    texts = webhook.texts(4)
    assert "holdfast: digits/one digits@3 became champion: 0.2 better" in texts
    assert "holdfast: digits/one digits@3 did not become champion: 0.2 better" in texts
    assert 'holdfast: digits/two stays crashed: no worker: "crashed" 9 times' in texts
    [failed] = [text for text in texts if "digits/three failed" in text]
    assert "the loss of step 3 is nan" in failed
    assert len(texts) == 4


@pytest.mark.slow
def test_what_is_no_url_is_refused(prefect_server: PrefectServer, tmp_path: Any) -> None:
    command = [sys.executable, "-P", "-m", "holdfast", "deploy", "--store", str(tmp_path)]
    done = subprocess.run(
        [*command, "--notify-url", "hooks.example.com"],
        env={**os.environ, **prefect_server.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "hooks.example.com is not a URL; expected https://host/path" in done.stderr
