"""Between a client and a server of objects: what a network and a busy server do to requests."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import pytest

from tests.contracts.object_servers import make_bucket

Fault = Literal[
    "none",
    "500",
    "503",
    "429",
    "reset",
    "hang",
    "ExpiredToken",
    "RequestTimeTooSkewed",
    "AccessDenied",
    "NoSuchBucket",
    "NoSuchKey",
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "503 after",
    "reset after",
    "hang after",
    "cut body",
    "slow body",
    "flipped bit",
    "flipped bit up",
    "range ignored",
]
"""``after``: the request has had its effect, and its answer is lost."""
STATUS = {
    "500": "500 Internal Server Error",
    "503": "503 Slow Down",
    "429": "429 Too Many Requests",
    "ExpiredToken": "400 Bad Request",
    "RequestTimeTooSkewed": "403 Forbidden",
    "AccessDenied": "403 Forbidden",
    "NoSuchBucket": "404 Not Found",
    "NoSuchKey": "404 Not Found",
    "PermanentRedirect": "301 Moved Permanently",
    "AuthorizationHeaderMalformed": "400 Bad Request",
}
SLOW_S = 2.0
HANG_S = 3600.0
SIGNER = re.compile(rb"(?i)authorization: (?:\S+ Credential=|Bearer )([^/\s]+)")


@dataclass
class FaultProxy:
    """Passes requests on to a port of this machine, each with the next fault of the plan.

    Attributes:
        plan: faults of the next requests that match; those after them have none.
        only: requests are counted and hurt whose first line matches this.
        for_ever: the fault of every matching request, once the plan is through.
        num_requests: all that came, by method.
        is_valid: whether a key, or a bearer's token, is one; the others have expired.
    """

    upstream: int
    plan: deque[Fault] = field(default_factory=deque)
    only: str = ""
    for_ever: Fault = "none"
    port: int = 0
    num_hurt: int = 0
    num_requests: Counter[str] = field(default_factory=Counter)
    is_valid: Callable[[str], bool] = lambda _: True

    def hurt(self, *faults: Fault, only: str = "", for_ever: Fault = "none") -> None:
        self.plan, self.only, self.for_ever = deque(faults), only, for_ever
        self.num_hurt = 0

    def counted(self, before: Mapping[str, int] | None = None) -> dict[str, int]:
        """How many requests came by method, since a count before."""
        return dict(self.num_requests - Counter(before or {}))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = _content_length(head)
        body = await reader.readexactly(length)
        fault = self._next_fault(head.split(b"\r\n", 1)[0].decode())
        self.num_requests[head.split(b" ", 1)[0].decode()] += 1
        if (found := SIGNER.search(head)) and not self.is_valid(found[1].decode()):
            fault = "ExpiredToken"
        if fault == "hang":
            await asyncio.sleep(HANG_S)
        if fault == "reset":
            writer.transport.abort()
            return
        if fault in STATUS:
            writer.write(_refusal(fault))
            await writer.drain()
            return
        if fault == "range ignored":
            head = re.sub(rb"(?i)\r\nrange: [^\r]*", b"", head)
        if fault == "flipped bit up" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        answer = await self._passed_on(head, body)
        await self._spoil(fault, answer, writer)

    async def _spoil(self, fault: Fault, answer: bytes, writer: asyncio.StreamWriter) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        if fault == "hang after":
            await asyncio.sleep(HANG_S)
        if fault == "reset after":
            writer.transport.abort()
            return
        if fault == "503 after":
            answer = _refusal("503")
        elif fault == "cut body":
            answer = answer[: len(head) + 4 + len(body) // 2]
        elif fault == "slow body":
            writer.write(answer[: len(head) + 4 + len(body) // 2])
            await writer.drain()
            await asyncio.sleep(SLOW_S)
            answer = answer[len(head) + 4 + len(body) // 2 :]
        elif fault == "flipped bit" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            answer = head + b"\r\n\r\n" + body
        writer.write(answer)
        await writer.drain()

    async def _passed_on(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        with closing(writer):
            head = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)
            writer.write(head[:-2] + b"Connection: close\r\n\r\n" + body)
            await writer.drain()
            return await reader.read(-1)

    def _next_fault(self, line: str) -> Fault:
        if re.search(self.only, line) is None:
            return "none"
        fault = self.plan.popleft() if self.plan else self.for_ever
        self.num_hurt += fault != "none"
        return fault


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _refusal(fault: str) -> bytes:
    told = f"<Error><Code>{fault}</Code><Message>token=hunter2</Message></Error>"
    body = "" if fault.isdigit() else told
    return (
        f"HTTP/1.1 {STATUS[fault]}\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


@contextmanager
def fault_proxy(upstream: int) -> Iterator[FaultProxy]:
    """A proxy before a port of this machine while the block runs."""
    proxy, loop, is_ready = FaultProxy(upstream), asyncio.new_event_loop(), threading.Event()

    async def run() -> None:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=2**20)
        proxy.port = server.sockets[0].getsockname()[1]
        is_ready.set()
        with suppress(asyncio.CancelledError):
            await server.serve_forever()

    async def end(answering: set[asyncio.Task[None]]) -> None:
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)
        await asyncio.sleep(0)  # in which their connections are closed

    def work() -> None:
        asyncio.set_event_loop(loop)
        main = loop.create_task(run())
        tasks.append(main)
        loop.run_until_complete(main)
        loop.run_until_complete(end(asyncio.all_tasks(loop)))
        loop.close()

    tasks: list[asyncio.Task[None]] = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    is_ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(tasks[0].cancel)
        thread.join(10)


@contextmanager
def hurt_way(
    environment: Mapping[str, str], endpoint: str = "AWS_ENDPOINT_URL"
) -> Iterator[tuple[FaultProxy, dict[str, str]]]:
    """A proxy before the server that an environment leads to, and what leads to the proxy."""
    port = urlsplit(environment[endpoint]).port
    assert port is not None
    with fault_proxy(port) as proxy:
        yield proxy, {**environment, endpoint: f"http://127.0.0.1:{proxy.port}"}


@contextmanager
def hurt_bucket(
    server: Mapping[str, str], name: str, patch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """A new bucket, and the way to it, which the patched environment names."""
    make_bucket(server, name)
    with hurt_way(server) as (proxy, environment):
        for variable, value in environment.items():
            patch.setenv(variable, value)
        yield proxy
