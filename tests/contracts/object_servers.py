"""Real servers of objects, on loopback, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

START_S = 60.0
# With a thread for each request, a busy machine lets two creations of one object succeed: moto
# looks and writes without a lock.
ONE_AFTER_ANOTHER = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app))
"""
KEY, SECRET = "HoldfastTestKey", "HoldfastTestSecret-7f3a"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def served(command: list[str], port: int, environment: Mapping[str, str]) -> Iterator[None]:
    """A server while the block runs, once it takes connections."""
    server = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline_s = time.monotonic() + START_S
        while not _answers(port):
            assert server.poll() is None, f"{command[0]} ended with {server.returncode}"
            assert time.monotonic() < deadline_s, f"{command[0]} does not answer"
            time.sleep(0.1)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def s3_environment(port: int) -> dict[str, str]:
    """What points a client to a server of S3 on this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def moto() -> Iterator[dict[str, str]]:
    """Moto's server; the environment that leads to it. It takes any signature and any checksum."""
    port = free_port()
    command = [sys.executable, "-P", "-c", ONE_AFTER_ANOTHER, str(port)]
    with served(command, port, {}):
        yield s3_environment(port)


@contextmanager
def seaweedfs(folder: Path) -> Iterator[dict[str, str]]:
    """SeaweedFS, which checks signatures and checksums; ``weed`` must be on the path."""
    port = free_port()
    weed = shutil.which("weed")
    assert weed is not None
    command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    environment = s3_environment(port)
    with served([*command, f"-s3.port={port}"], port, environment):
        yield environment


def make_bucket(environment: Mapping[str, str], name: str) -> None:
    """A new bucket of an S3 server; the first request may come before the server is ready."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
        config=Config(retries={"max_attempts": 0}),
    )
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            client.create_bucket(Bucket=name)
            return
        except (BotoCoreError, ClientError):
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1.0)
        return client.connect_ex(("127.0.0.1", port)) == 0
