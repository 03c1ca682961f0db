"""Pulling from a plain static file server over real connections, whatever they do."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from holdfast.training.bundles import console, consumer
from holdfast.training.bundles.http_store import HttpStore
from holdfast.training.bundles.pull import MARK, pull
from holdfast.training.bundles.registry import BundleReference, Registry
from holdfast.training.errors import BundleError, InputError, StorageError
from tests.training.bundles.small_bundle import files_of, make_bundle

LARGE = "model.safetensors"
SIZE_BYTES = 35_001
REGISTRY = "store/registry/digits/versions/000002"


class Server(ThreadingHTTPServer):
    """Serves a folder; each attribute is a way in which servers and networks differ.

    Attributes:
        has_ranges: as most servers, but not as Python's own.
        has_page_for_missing: says 200, and something else, for files that are not there.
        drop_after: bytes of the large file after which the connection is cut.
        num_busy: answers with 503 that come first.
        asked: how often each path, with its Range header, was asked for.
    """

    daemon_threads = True
    has_ranges = True
    has_page_for_missing = False
    drop_after: int | None = None
    num_busy = 0

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/store/"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range", "")
        server.asked[f"{self.path} {wanted}".strip()] += 1
        path = server.folder / self.path.lstrip("/")
        if server.num_busy:
            server.num_busy -= 1
            self.send_error(503)
        elif not path.is_file():
            self.send_error(200 if server.has_page_for_missing else 404)
        else:
            start = int(wanted[6:-1]) if wanted and server.has_ranges else 0
            self._send(path, start, 206 if start else 200)

    def _send(self, path: Path, start: int, status: int) -> None:
        content = path.read_bytes()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        limit = self.server.drop_after if path.name == LARGE else None
        self.wfile.write(content[start:][:limit])


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A store with two versions of ``digits``; ``champion`` was moved four times."""
    registry = Registry(tmp_path / "served/store")
    for number in range(2):
        registry.publish(make_bundle(tmp_path / f"source-{number}", number))
    for version in (1, 2, 1, 2):
        after = registry.position("digits", "champion")
        registry.move_alias("digits", "champion", version, reason="test", after=after)
    server = Server(tmp_path / "served")
    with running(server):
        yield server


def pull_from(server: Server, target: Path, reference: str = "digits") -> None:
    store = HttpStore(server.url, retry_s=0.001)
    asked = BundleReference.parse(reference)
    pull(store.source(asked.name, store.resolve(asked)), target)


def half_file(target: Path) -> Path:
    """Where a pull that was interrupted keeps the large file."""
    content = target.with_name(f"{target.name}.partial") / "bundle"
    content.mkdir(parents=True)
    (content.parent / MARK).touch()
    return content / LARGE


@pytest.mark.parametrize(("reference", "number"), [("digits", 1), ("digits@1", 0)])
def test_a_reference_is_found_without_listing_folders(
    server: Server, tmp_path: Path, reference: str, number: int
) -> None:
    pull_from(server, tmp_path / "there", reference)
    assert files_of(tmp_path / "there") == files_of(tmp_path / f"source-{number}")
    assert not [path for path in server.asked if path.endswith("/")]


def test_the_newest_position_of_an_alias_is_found_among_many(
    server: Server, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "served/store")
    store = HttpStore(server.url)
    for moves in range(5, 20):
        after = registry.position("digits", "champion")
        version = 1 + moves % 2
        registry.move_alias("digits", "champion", version, reason="", after=after)
        assert store.resolve(BundleReference.parse("digits")) == version


def test_pythons_own_server_will_do(server: Server, tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path / "served"))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            pass

    plain = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    with running(plain):
        url = f"http://127.0.0.1:{plain.server_address[1]}/store"
        there = str(tmp_path / "there")
        assert console.main(["pull", "digits", "--store", url, "--to", there]) == 0
    assert files_of(tmp_path / "there") == files_of(tmp_path / "source-1")


def test_a_cut_connection_is_gone_on_with_by_ranges(server: Server, tmp_path: Path) -> None:
    server.drop_after = 10_000
    pull_from(server, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "source-1")
    starts = [path.partition(" ")[2] for path in server.asked if LARGE in path]
    assert starts == ["", "bytes=10000-", "bytes=20000-", "bytes=30000-"]


def test_a_pull_that_gave_up_goes_on_when_it_is_called_again(
    server: Server, tmp_path: Path
) -> None:
    server.drop_after = 0
    half = half_file(tmp_path / "there")
    half.write_bytes((tmp_path / "source-1" / LARGE).read_bytes()[:20_000])
    with pytest.raises(StorageError, match=r"20,000 bytes are here.*run the same command again"):
        pull_from(server, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    server.drop_after = None
    server.asked.clear()
    pull_from(server, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "source-1")
    assert [p for p in server.asked if "versions" in p and not p.endswith("manifest.json")] == [
        f"/{REGISTRY}/{LARGE} bytes=20000-"
    ]


def test_without_ranges_the_known_part_is_skipped(server: Server, tmp_path: Path) -> None:
    server.has_ranges = False
    half = half_file(tmp_path / "there")
    half.write_bytes((tmp_path / "source-1" / LARGE).read_bytes()[:20_000])
    pull_from(server, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "source-1")


def test_a_connection_that_always_breaks_early_ends_the_pull(
    server: Server, tmp_path: Path
) -> None:
    server.has_ranges, server.drop_after = False, 10_000
    with pytest.raises(StorageError, match="10,000 bytes are here after 5 attempts"):
        pull_from(server, tmp_path / "there")


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.num_busy = 3
    pull_from(server, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "source-1")


def spoil(server: Server, name: str, content: bytes) -> None:
    (server.folder / REGISTRY / name).write_bytes(content)


def test_a_wrong_byte_is_refused_by_name(server: Server, tmp_path: Path) -> None:
    right = (tmp_path / "source-1" / LARGE).read_bytes()
    spoil(server, LARGE, right[:-9] + b"\0" + right[-8:])
    with pytest.raises(BundleError, match=r"model\.safetensors was altered"):
        pull_from(server, tmp_path / "there")
    spoil(server, LARGE, right + b"more")
    with pytest.raises(BundleError, match=r"model\.safetensors was altered: 35,002 bytes"):
        pull_from(server, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_half_file_of_something_else_is_fetched_again(server: Server, tmp_path: Path) -> None:
    half = half_file(tmp_path / "there")
    half.write_bytes(b"something else")
    pull_from(server, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "source-1")


def test_what_is_missing_or_altered_is_said(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no alias 'nightly' of a bundle 'digits'"):
        pull_from(server, tmp_path / "there", "digits@nightly")
    with pytest.raises(InputError, match=r"there is no bundle http://.*/versions/000007"):
        pull_from(server, tmp_path / "there", "digits@7")
    server.has_page_for_missing = True
    with pytest.raises(BundleError, match="is no position of an alias"):
        pull_from(server, tmp_path / "there", "digits@nightly")
    server.has_page_for_missing = False
    (server.folder / REGISTRY / "README.md").unlink()
    with pytest.raises(BundleError, match=r"README\.md is missing"):
        pull_from(server, tmp_path / "there")
    spoil(server, consumer.MANIFEST, b"{}\n")
    with pytest.raises(BundleError, match=r"manifest\.json was altered"):
        pull_from(server, tmp_path / "there")


def test_a_server_that_is_away_is_said_without_the_password(tmp_path: Path) -> None:
    store = HttpStore("http://me:secret@127.0.0.1:9/store", retry_s=0.001)
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9/store/.*Connect") as caught:
        store.resolve(BundleReference.parse("digits"))
    assert "secret" not in str(caught.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_https_is_read_with_a_known_certificate_and_refused_with_an_unknown_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    words += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key)]
    subprocess.run([*words, "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    safe = Server(tmp_path / "served")
    safe.socket = context.wrap_socket(safe.socket, server_side=True)
    safe.handle_error = lambda *_: None  # type: ignore[method-assign]
    url = safe.url.replace("http:", "https:")
    with running(safe):
        with pytest.raises(StorageError, match="CERTIFICATE_VERIFY_FAILED"):
            HttpStore(url, retry_s=0.001).resolve(BundleReference.parse("digits"))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert HttpStore(url).resolve(BundleReference.parse("digits")) == 2
