"""What a client gets when the way to the server, or the server, is bad. The server is moto."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.training.errors import InputError, StorageError
from holdfast.training.storage.address import parse_address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import PART_BYTES, ObjectStore, Unchanged
from holdfast.training.tiers.transfer import download_file, upload_file
from tests.contracts.fault_proxy import Fault, FaultProxy, hurt_bucket
from tests.contracts.object_servers import (
    SECRET,
    free_port,
    moto,
    s3_environment,
    seaweedfs,
)
from tests.contracts.test_object_stores import require_program

bucket = pytest.importorskip("holdfast.training.storage.bucket", reason="no extra 'bucket'")
pytest.importorskip("moto", reason="moto is not installed")
PASSING: tuple[Fault, ...] = (
    "500",
    "503",
    "429",
    "reset",
    "hang",
    "503 after",
    "reset after",
    "hang after",
)


@pytest.fixture(scope="module")
def ways() -> Iterator[tuple[ObjectStore, FaultProxy]]:
    """A store, and the proxy on the way to it; one request takes a second at most."""
    with (
        pytest.MonkeyPatch.context() as patch,
        moto() as server,
        hurt_bucket(server, "faults", patch) as proxy,
    ):
        for name, seconds in (("SMALL_TIMEOUT_S", 1.5), ("BULK_TIMEOUT_S", 3.0)):
            patch.setattr(bucket, name, seconds)
        for name in ("RETRY_S", "RETRY_BULK_S"):
            patch.setattr(bucket, name, 8.0)
        yield open_store(parse_address("s3://faults/x")), proxy


@pytest.fixture
def way(ways: tuple[ObjectStore, FaultProxy]) -> Iterator[tuple[ObjectStore, FaultProxy]]:
    yield ways
    ways[1].hurt()


def new_key() -> str:
    return f"k/{secrets.token_hex(8)}"


def nonce() -> bytes:
    return secrets.token_bytes(16)


@pytest.mark.parametrize("fault", PASSING)
def test_a_creation_happens_once_and_is_known_for_ours(
    fault: Fault, way: tuple[ObjectStore, FaultProxy]
) -> None:
    store, proxy = way
    key, content = new_key(), nonce()
    proxy.hurt(fault, only="^PUT")
    tag = store.put(key, content, "absent")
    assert proxy.num_hurt == 1
    found = store.get(key)
    assert found is not None
    assert (found.content, found.tag) == (content, tag)
    proxy.hurt(fault, only="^PUT")
    assert store.put(key, nonce(), "absent") is None


@pytest.mark.parametrize("fault", PASSING)
def test_a_swap_happens_once_and_is_known_for_ours(
    fault: Fault, way: tuple[ObjectStore, FaultProxy]
) -> None:
    store, proxy = way
    key, content = new_key(), nonce()
    first = store.put(key, nonce(), "absent")
    assert first is not None
    proxy.hurt(fault, only="^PUT")
    tag = store.put(key, content, Unchanged(first))
    assert proxy.num_hurt == 1
    found = store.get(key)
    assert found is not None
    assert (found.content, found.tag) == (content, tag)
    proxy.hurt(fault, only="^PUT")
    assert store.put(key, nonce(), Unchanged(first)) is None


@pytest.mark.parametrize(
    "fault",
    [
        *("500", "503", "reset", "hang", "cut body"),
        pytest.param("slow body", marks=pytest.mark.slow),
    ],
)
def test_a_read_is_tried_again(fault: Fault, way: tuple[ObjectStore, FaultProxy]) -> None:
    store, proxy = way
    key, content = new_key(), secrets.token_bytes(300_000)
    store.put(key, content, "any")
    proxy.hurt(fault, only="^GET")
    found = store.get(key)
    assert proxy.num_hurt == 1
    assert found is not None
    assert found.content == content


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize(
    "fault",
    [
        "503",
        "reset",
        "503 after",
        "reset after",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("500", "hang", "hang after")),
    ],
)
def test_an_upload_is_tried_again(
    method: str, fault: Fault, way: tuple[ObjectStore, FaultProxy]
) -> None:
    """PUT: a part. POST: the beginning, and with a second one the completion."""
    store, proxy = way
    key, content = new_key(), secrets.token_bytes(PART_BYTES + 5)
    proxy.hurt(*(["none", fault] if method == "POST" else [fault]), only=f"^{method}")  # type: ignore[list-item]
    try:
        store.upload(key, [content[:PART_BYTES], content[PART_BYTES:]])
    except StorageError:
        assert (method, fault.endswith("after")) == ("POST", True), "only a completion may be lost"
    found = store.get(key)
    assert found is not None
    assert found.content == content


@pytest.mark.parametrize("size_bytes", [100_000, 2 * PART_BYTES + 1])
def test_a_flipped_bit_is_seen_and_read_again(
    size_bytes: int, way: tuple[ObjectStore, FaultProxy], tmp_path: Path
) -> None:
    store, proxy = way
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(secrets.token_bytes(size_bytes))
    file = upload_file(store, source, new_key())
    proxy.hurt("flipped bit", only="^GET")
    download_file(store, file, target)
    assert proxy.num_hurt == 1
    assert target.read_bytes() == source.read_bytes()
    proxy.hurt(only="^GET", for_ever="flipped bit")
    with pytest.raises(StorageError, match="was altered"):
        download_file(store, file, target)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        pytest.param("503", "503", marks=pytest.mark.slow),
        pytest.param("reset", "does not answer", marks=pytest.mark.slow),
        ("ExpiredToken", "the credentials have expired"),
        ("AccessDenied", "the server does not allow it"),
        ("RequestTimeTooSkewed", "this machine's clock is wrong"),
    ],
)
def test_what_does_not_pass_is_one_line_without_a_secret(
    fault: Fault, expected: str, way: tuple[ObjectStore, FaultProxy]
) -> None:
    store, proxy = way
    proxy.hurt(for_ever=fault)
    with pytest.raises(StorageError) as failed:
        store.put(new_key(), nonce(), "absent")
    told = str(failed.value)
    assert expected in told
    assert "\n" not in told
    assert "hunter2" not in told
    assert SECRET not in told
    assert failed.value.__suppress_context__


def test_a_server_that_ignores_ranges_gives_no_wrong_bytes(
    way: tuple[ObjectStore, FaultProxy],
) -> None:
    store, proxy = way
    key = new_key()
    store.put(key, b"0123456789", "any")
    proxy.hurt("range ignored", only="^GET")
    with pytest.raises(StorageError, match="cannot read"):
        store.get(key, 3, 7)


def test_a_key_that_is_listed_and_is_not_found_is_absent(
    way: tuple[ObjectStore, FaultProxy],
) -> None:
    store, proxy = way
    key = new_key()
    store.put(key, nonce(), "any")
    proxy.hurt("NoSuchKey", only="^GET")
    assert store.get(key) is None
    assert store.get(key) is not None


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("NoSuchBucket", "there is no bucket 'faults' here"),
        ("PermanentRedirect", "the bucket is in another region"),
        ("AuthorizationHeaderMalformed", "the bucket is in another region"),
    ],
)
def test_a_bucket_that_is_not_here_is_an_error_of_the_input(
    fault: Fault, expected: str, way: tuple[ObjectStore, FaultProxy]
) -> None:
    store, proxy = way
    proxy.hurt(for_ever=fault)
    for ask in (
        lambda: store.get("k/x"),
        lambda: store.put("k/x", b"x", "any"),
        lambda: store.list("k"),
    ):
        with pytest.raises(InputError, match=expected):
            ask()


def test_credentials_that_end_in_the_middle_of_an_upload_end_it_and_leave_no_object(
    way: tuple[ObjectStore, FaultProxy], tmp_path: Path
) -> None:
    store, proxy = way
    source, key = tmp_path / "source", new_key()
    source.write_bytes(secrets.token_bytes(3 * PART_BYTES))
    proxy.hurt("none", for_ever="ExpiredToken", only="^PUT")
    with pytest.raises(StorageError, match="the credentials have expired"):
        upload_file(store, source, key)
    assert store.get(key) is None
    proxy.hurt()
    assert upload_file(store, source, key).size_bytes == 3 * PART_BYTES


def test_where_nobody_listens_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "RETRY_S", 0.5)
    for name, value in s3_environment(free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="the server does not answer in time"):
        open_store(parse_address("s3://faults/x")).get("k/x")


@pytest.mark.slow
@pytest.mark.parametrize("size_bytes", [100_000, 2 * PART_BYTES])
def test_a_bit_that_flips_on_the_way_up_is_refused_by_the_servers_checksum(
    size_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_program("weed")
    source = tmp_path / "source"
    source.write_bytes(secrets.token_bytes(size_bytes))
    with seaweedfs(tmp_path) as server, hurt_bucket(server, "faults", monkeypatch) as proxy:
        store = open_store(parse_address("s3://faults/x"))
        proxy.hurt("flipped bit up", only="^PUT")
        if size_bytes > PART_BYTES:
            with pytest.raises(StorageError, match="the server answers 400"):
                upload_file(store, source, "k/x")
            assert store.get("k/x") is None
        upload_file(store, source, "k/x")  # a small one is sent again by itself
        assert proxy.num_hurt == 1
        found = store.get("k/x")
        assert found is not None
        assert found.content == source.read_bytes()


def test_a_write_that_is_answered_by_not_found_has_not_happened(
    way: tuple[ObjectStore, FaultProxy],
) -> None:
    store, proxy = way
    key = new_key()
    proxy.hurt("NoSuchKey", only="^PUT")
    with pytest.raises(StorageError, match="cannot write"):
        store.put(key, nonce(), "any")
    proxy.hurt("NoSuchKey", only="^PUT")
    assert store.put(key, nonce(), Unchanged('"0123456789abcdef0123456789abcdef"')) is None
