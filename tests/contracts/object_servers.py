"""Real servers of objects, on loopback, each in a process of its own."""

from __future__ import annotations

import base64
import hmac
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
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
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = (  # the emulator's own, as its documentation has it
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
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


@contextmanager
def rclone(folder: Path) -> Iterator[dict[str, str]]:
    """Rclone's server of a folder, which takes conditional writes for plain ones."""
    port = free_port()
    program = shutil.which("rclone")
    assert program is not None
    command = [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key"]
    with served([*command, f"{KEY},{SECRET}", str(folder)], port, {}):
        yield s3_environment(port)


@contextmanager
def google() -> Iterator[dict[str, str]]:
    """Google's XML interface, as far as it is used; its buckets are there."""
    port = free_port()
    command = [sys.executable, "-P", str(Path(__file__).with_name("google_server.py")), str(port)]
    with served(command, port, {}):
        url = f"http://127.0.0.1:{port}"
        account = {"gcs_base_url": url, "disable_oauth": True}
        account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        yield {"GOOGLE_BASE_URL": url, "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account)}


@contextmanager
def azurite() -> Iterator[dict[str, str]]:
    """Microsoft's emulator of Azure's blobs; ``azurite-blob`` must be on the path."""
    port = free_port()
    program = shutil.which("azurite-blob")
    assert program is not None
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    with served([*command, "--skipApiVersionCheck", "-s"], port, {}):
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": AZURITE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURITE_KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{AZURITE_ACCOUNT}",
        }


def make_container(environment: Mapping[str, str], name: str) -> None:
    """A new container of an Azure server, by one signed request."""
    endpoint = environment["AZURE_STORAGE_ENDPOINT"]
    date = formatdate(usegmt=True)
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": "0"}
    account = environment["AZURE_STORAGE_ACCOUNT_NAME"]
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-08-06\n"
    signed += f"/{account}/{account}/{name}\nrestype:container"
    key = base64.b64decode(environment["AZURE_STORAGE_ACCOUNT_KEY"])
    signature = base64.b64encode(hmac.digest(key, signed.encode(), "sha256")).decode()
    headers["Authorization"] = f"SharedKey {account}:{signature}"
    url = f"{endpoint}/{name}?restype=container"
    asked = urllib.request.Request(url, method="PUT", headers=headers)
    with urllib.request.urlopen(asked, timeout=START_S) as answer:
        assert answer.status == 201


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
