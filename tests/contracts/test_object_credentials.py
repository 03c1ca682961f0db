"""Credentials that end while a store is used: real ways to have some, from a server on loopback."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.training.errors import StorageError
from holdfast.training.storage.address import parse_address
from holdfast.training.storage.opening import open_store
from tests.contracts.credential_server import (
    SECRET,
    CredentialServer,
    credential_server,
    make_certificates,
)
from tests.contracts.fault_proxy import FaultProxy, hurt_way
from tests.contracts.object_servers import google, make_bucket, moto

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
pytest.importorskip("moto", reason="moto is not installed")
NAMED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE")


@pytest.fixture(scope="module")
def way() -> Iterator[FaultProxy]:
    """The way to a server, on which credentials are checked."""
    with moto() as environment:
        make_bucket(environment, "runs")
        with hurt_way(environment) as (proxy, _):
            yield proxy


@pytest.fixture
def clouds(
    way: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CredentialServer]:
    """An environment that leads to the server, and names no credentials."""
    for name in NAMED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{way.port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with credential_server() as server:
        monkeypatch.setattr(way, "is_valid", server.is_valid)
        yield server


def of_a_pod(server: CredentialServer, folder: Path) -> dict[str, str]:
    (folder / "token").write_text("a-token-of-the-pod")
    return {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{server.url}/pod",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(folder / "token"),
    }


def of_a_machine(server: CredentialServer, folder: Path) -> dict[str, str]:
    return {"AWS_METADATA_ENDPOINT": server.url}


def use(address: str, for_s: float) -> None:
    """Write and read, again and again."""
    store, end_s = open_store(parse_address(address)), time.monotonic() + for_s
    while time.monotonic() < end_s:
        key, content = f"k/{secrets.token_hex(8)}", secrets.token_bytes(16)
        assert store.put(key, content, "absent") is not None
        found = store.get(key)
        assert found is not None
        assert found.content == content
        time.sleep(0.1)


@pytest.mark.parametrize(
    "kind",
    [
        of_a_pod,
        pytest.param(of_a_machine, marks=pytest.mark.slow),
    ],
)
def test_new_credentials_are_taken_before_the_old_ones_end(
    kind: object, clouds: CredentialServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(kind)
    for name, value in kind(clouds, tmp_path).items():
        monkeypatch.setenv(name, value)
    use("s3://runs/x", for_s=3.0 * clouds.lifetime_s)
    assert len(clouds.asked) >= 3


@pytest.mark.slow
def test_a_web_identity_is_asked_for_again_by_its_token(
    way: FaultProxy, clouds: CredentialServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Amazon's service of security tokens is asked by TLS alone."""
    (tmp_path / "token").write_text("a-token-of-the-identity")
    monkeypatch.setenv("SSL_CERT_FILE", str(make_certificates(tmp_path)))
    with credential_server(tmp_path) as server:
        monkeypatch.setattr(way, "is_valid", server.is_valid)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/holdfast-run")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        use("s3://runs/x", for_s=3.0 * server.lifetime_s)
        assert len(server.asked) >= 3


@pytest.mark.slow
def test_a_federated_account_of_google_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("google.auth", reason="the extra 'gcp' is not installed")
    (tmp_path / "token").write_text("a-token-of-the-identity")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    with (
        google() as environment,
        credential_server() as server,
        hurt_way(environment, "GOOGLE_BASE_URL") as (proxy, leading),
    ):
        proxy.is_valid = server.is_valid
        monkeypatch.setenv("GOOGLE_BASE_URL", leading["GOOGLE_BASE_URL"])
        account = {
            "type": "external_account",
            "audience": "//iam.googleapis.com/projects/1/locations/global/x/y",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": f"{server.url}/google",
            "credential_source": {"file": str(tmp_path / "token")},
        }
        (tmp_path / "account.json").write_text(json.dumps(account))
        use("gs://runs/x", for_s=3.0 * server.lifetime_s)
        assert len(server.asked) >= 3


def test_a_renewed_profile_helps_at_once(
    way: FaultProxy, clouds: CredentialServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read again where the server says that its keys have ended."""
    (tmp_path / ".aws").mkdir()

    def write_keys(key: str) -> None:
        text = f"[default]\naws_access_key_id={key}\naws_secret_access_key={SECRET}\n"
        (tmp_path / ".aws" / "credentials").write_text(text)

    monkeypatch.setattr(way, "is_valid", lambda key: key == "FIRST")
    write_keys("FIRST")
    store = open_store(parse_address("s3://runs/x"))
    assert store.put("one", b"1", "any") is not None
    monkeypatch.setattr(way, "is_valid", lambda key: key == "SECOND")
    with pytest.raises(StorageError, match="the credentials have expired") as failed:
        store.put("two", b"2", "any")
    assert SECRET not in str(failed.value)
    write_keys("SECOND")
    assert store.put("two", b"2", "any") is not None


def test_where_there_are_no_credentials_that_is_said(
    clouds: CredentialServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.training.storage import bucket

    monkeypatch.setattr(bucket, "RETRY_S", 1.0)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://169.254.169.254:9")
    with pytest.raises(StorageError, match="no credentials were found"):
        open_store(parse_address("s3://runs/x")).get("one")
