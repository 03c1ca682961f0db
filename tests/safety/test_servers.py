"""Pulling from servers of strangers: what they answer is a bundle, or one line says why not."""

from __future__ import annotations

import random
import socketserver
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from holdfast.training.bundles import consumer, http_store
from holdfast.training.bundles.http_store import HttpStore
from holdfast.training.bundles.pull import pull
from holdfast.training.bundles.registry import BundleReference
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.runs.shown_text import shown
from tests.safety.hostile import ESCAPES, digest_of_tree, odd_texts, odd_values, within
from tests.training.bundles.small_bundle import files_of, make_bundle

LIMIT_S = 10.0
ALIAS = "/registry/digits/aliases/champion/"
VERSION = "/registry/digits/versions/000001/"
POSITION = {"moved_at": "x", "reason": "x", "version": 1}


class Server(socketserver.ThreadingTCPServer):
    """Answers with bytes, whatever they are: those of the longest known beginning of a path."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answers: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        words = self.rfile.readline().decode().split()
        while self.rfile.readline().strip():
            pass
        path = words[1] if len(words) > 1 else ""
        self.server.asked[path] += 1
        known = [beginning for beginning in self.server.answers if path.startswith(beginning)]
        answer = self.server.answers[max(known, key=len)] if known else NOT_FOUND
        try:
            self.wfile.write(answer)
        except OSError:
            return  # the other side has heard enough


def http(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = [f"HTTP/1.1 {status}", f"Content-Length: {size}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


NOT_FOUND = http(b"", "404 Not Found")


@contextmanager
def serving(answers: dict[str, bytes]) -> Iterator[Server]:
    with Server(answers) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a good server answers."""
    import json

    bundle = make_bundle(tmp_path_factory.mktemp("served") / "bundle")
    answers = {VERSION + name: http(content) for name, content in files_of(bundle).items()}
    return {**answers, f"{ALIAS}000001.json": http(json.dumps(POSITION).encode())}


def raw_answers() -> dict[str, bytes]:
    """What is hardly HTTP any more, or not what was asked for."""
    statuses = "100 201 204 205 206 301 302 307 308 304 400 401 403 405 410 416 418 500 503 599 999"
    told = {f"status {code}": http(b"x", f"{code} Odd") for code in statuses.split()}
    return {
        **told,
        "nothing": b"",
        "noise": random.Random(1).randbytes(300),
        "no status": b"HTTP/1.1\r\n\r\n",
        "a pickle": b"\x80\x04cposix\nsystem\n",
        "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000,
        "long header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10**6,
        "escapes": http(b"x", f"302 Found {ESCAPES}".replace("\r\n", "")[:30], "Location: \x1b[2J"),
        "elsewhere": http(b"", "302 Found", "Location: http://127.0.0.1:1/"),
        "itself": http(b"", "302 Found", f"Location: {ALIAS}000001.json"),
        "gzip": http(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip"),
        "too short": http(b"{}", length=1000),
        "too long": http(b"x" * 1000, length=3),
        "negative length": http(b"{}", length=-5),
        "two lengths": http(b"{}", "200 OK", "Content-Length: 7"),
        "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx",
        "half a range": http(b"x", "206 Partial Content", "Content-Range: bytes 5-9/10"),
        "a page": http(b"<html>not found</html>"),
    }


def cases() -> dict[str, dict[str, bytes]]:
    """Answers that take the place of a good server's, by what they are."""
    rng = random.Random(9)
    texts = {**odd_texts(rng, POSITION), **odd_values(rng, POSITION, 20)}
    found = {f"alias: {what}": {ALIAS: http(text)} for what, text in texts.items()}
    for what, answer in raw_answers().items():
        found[f"alias: {what}"] = {ALIAS: answer}
        found[f"manifest: {what}"] = {f"{VERSION}manifest.json": answer}
        found[f"file: {what}"] = {f"{VERSION}model.safetensors": answer}
    for what, text in texts.items():
        found[f"manifest of {what}"] = {f"{VERSION}manifest.json": http(text)}
    return found


def test_whatever_a_server_answers_it_is_one_line(
    good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_store, "TIMEOUT_S", 1.0)
    (tmp_path / "precious").write_text("mine")
    outside = digest_of_tree(tmp_path)
    all_cases = cases()
    assert len(all_cases) >= 60
    with serving(good) as server:
        store = HttpStore(server.url, retry_s=0.001)
        for number, (what, odd) in enumerate(all_cases.items()):
            kept = {
                name: answer for name, answer in good.items() if not name.startswith(tuple(odd))
            }
            server.answers = {**kept, **odd}
            server.asked.clear()
            target = tmp_path / f"there-{number}"
            try:
                with within(LIMIT_S):
                    told = pulled(store, target)
            except Exception as error:
                raise AssertionError(f"{what}: {error!r}") from error
            assert told == shown(told), what
            assert sum(server.asked.values()) < 100, what
            assert not target.exists() or consumer.verify_files(target), what
            remove_pulled(target)
    assert digest_of_tree(tmp_path) == outside


def pulled(store: HttpStore, target: Path) -> str:
    """The name of what was pulled, or why nothing was."""
    try:
        reference = BundleReference.parse("digits")
        source: Any = store.source("digits", store.resolve(reference))
        return str(pull(source, target, name="digits")["name"])
    except HoldfastError as error:
        return " ".join(str(error).splitlines())


def remove_pulled(target: Path) -> None:
    import shutil

    for folder in (target, target.with_name(f"{target.name}.partial")):
        shutil.rmtree(folder, ignore_errors=True)


def test_a_good_server_is_pulled_from(good: dict[str, bytes], tmp_path: Path) -> None:
    with serving(good) as server:
        assert pulled(HttpStore(server.url), tmp_path / "there") == "digits"


def test_an_alias_that_never_ends_is_given_up_soon(good: dict[str, bytes], tmp_path: Path) -> None:
    position = good[f"{ALIAS}000001.json"]
    with serving({**good, ALIAS: position}) as server, within(LIMIT_S):
        store = HttpStore(server.url)
        assert "seems to have more than" in pulled(store, tmp_path / "there")
        assert sum(server.asked.values()) < 50


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x",
        "http://:80",
        "http://[::1",
        "http://host:port/",
        "http://a\nb/",
        "http://a\x1b[2Jb/",
        "https://xn--/",
        "http://me:secret@/x",
        "http://me:secret@[::1/x",
        "http://exa mple..com/",
        "http://" + "a" * 300 + "/",
        "http://\ud800/",
    ],
)
def test_an_address_that_is_none_is_said_without_a_password(url: str) -> None:
    with within(LIMIT_S), pytest.raises(InputError) as caught:
        HttpStore(url, retry_s=0.001).resolve(BundleReference.parse("digits"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"), [("HTTP_PROXY", "nonsense://x"), ("SSL_CERT_FILE", "/nowhere")]
)
def test_an_environment_that_keeps_http_from_working_is_said(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="HTTP cannot be spoken as the environment says"):
        HttpStore("http://127.0.0.1:1/")
