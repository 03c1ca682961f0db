"""Bundles of a store that a plain static file server shows over HTTP or HTTPS, to read only.

The server need not list folders, nor know about ranges: positions of an alias are numbered without
gaps, so the newest one is found by asking for numbers; and where a server answers with the whole
file instead of its rest, the part that is known is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from holdfast.training.bundles import consumer
from holdfast.training.bundles.registry import REGISTRY, BundleReference, numbered
from holdfast.training.errors import BundleError, DataFormatError, InputError, StorageError
from holdfast.training.runs.shown_text import shown
from holdfast.training.runs.stored_json import parse_json, required_fields

TIMEOUT_S = 30.0
MAX_IDLE_ATTEMPTS = 5
MAX_MANIFEST_BYTES = 64 << 20
MAX_POSITIONS = 1 << 20
MAX_HEADER_CHARS = 300
SMALL_FILE_S = 300.0
OK, PARTIAL, NOT_FOUND, BAD_RANGE = 200, 206, 404, 416
TRY_AGAIN = (408, 429, 500, 502, 503, 504)


class HttpStore:
    """A store by its URL: ``<url>/registry/<name>/...``, as it lies in a folder.

    Attributes:
        retry_s: wait before a second attempt; twice as long before each further one.
    """

    def __init__(self, url: str, retry_s: float = 0.5) -> None:
        try:
            own = httpx.URL(url)
            if not own.host:
                raise InputError(
                    f"store {_without_password(url)} names no host; expected http://host:port/path/"
                )
            self._url = own.copy_with(query=None, fragment=None)
            self._url.raw_path.decode()
        except (httpx.InvalidURL, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"store {_without_password(url)} is no address ({error}); expected "
                "http://host:port/path/"
            ) from error
        self._retry_s = retry_s
        try:
            self._client = httpx.Client(
                timeout=TIMEOUT_S,
                headers={"Accept-Encoding": "identity", "Cache-Control": "no-cache"},
            )
        except (httpx.InvalidURL, OSError, ValueError) as error:  # proxies and certificates
            raise InputError(
                f"HTTP cannot be spoken as the environment says ({error}): look at HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
            ) from error

    def __str__(self) -> str:
        """The URL without a password."""
        return str(self._url.copy_with(username=None, password=None)).rstrip("/")

    def resolve(self, reference: BundleReference) -> int:
        """The version that a reference means; a number is taken as it is.

        Raises InputError where there is no such alias, StorageError where the server is away.
        """
        if reference.version is not None:
            return reference.version
        folder = f"{REGISTRY}/{reference.name}/aliases/{reference.alias}"
        version, number, step = 0, 0, 1
        while step:
            if step > MAX_POSITIONS:
                raise BundleError(
                    f"{self}/{folder} seems to have more than {MAX_POSITIONS:,} positions: the "
                    f"server shows a page for files that are not there; name a version: "
                    f"{reference.name}@1"
                )
            path = f"{folder}/{numbered(number + step)}.json"
            content = self.get(path)
            if content is not None:
                version, number = self._version_in(path, content), number + step
                step *= 2
            else:
                step //= 2
        if not version:
            raise InputError(
                f"{self} has no alias {reference.alias!r} of a bundle {reference.name!r}; name a "
                f"version: {reference.name}@1"
            )
        return version

    def _version_in(self, path: str, content: bytes) -> int:
        """What a position of an alias says. A server may show a page for files it does not have."""
        try:
            moved = required_fields(parse_json(content, path), path, {"version": (int,)})
        except DataFormatError as error:
            raise BundleError(f"{self}/{path} is no position of an alias: {error}") from error
        version: int = moved["version"]
        if not 1 <= version <= MAX_POSITIONS:
            raise BundleError(f"{self}/{path} is no position of an alias: version {version!r:.40}")
        return version

    def source(self, name: str, version: int) -> HttpSource:
        """The bundle of a version, whether it is there or not."""
        return HttpSource(self, f"{REGISTRY}/{name}/versions/{numbered(version)}")

    def get(self, path: str) -> bytes | None:
        """A small file; None where the server has none. Raises StorageError and BundleError."""
        content = bytearray()
        deadline_s = time.monotonic() + SMALL_FILE_S
        try:
            for chunk in self.stream(path, 0, None):
                content += chunk
                if len(content) > MAX_MANIFEST_BYTES:
                    raise BundleError(f"{self}/{path} has more than {MAX_MANIFEST_BYTES:,} bytes")
                if time.monotonic() > deadline_s:
                    raise StorageError(
                        f"{self}/{path}: only {len(content):,} bytes came in {SMALL_FILE_S:g} s; "
                        "try again when the server is faster"
                    )
        except FileNotFoundError:
            return None
        return bytes(content)

    def stream(self, path: str, start: int, size_bytes: int | None) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on, over as many connections as it takes.

        Raises:
            FileNotFoundError: the server has no such file.
            BundleError: it answers with something else than the file.
            StorageError: several attempts in a row brought nothing.
        """
        position, num_idle = start, 0
        while True:
            reason = "the connection ended early"
            before = position
            try:
                for chunk in self._attempt(path, position):
                    position += len(chunk)
                    yield chunk
                if size_bytes is None or position >= size_bytes:
                    return
            except httpx.TransportError as error:
                reason = shown(f"{type(error).__name__}: {error}", MAX_HEADER_CHARS)
            except (httpx.InvalidURL, UnicodeError, OverflowError) as error:
                raise InputError(f"{self}/{path} is no address: {error}") from error
            num_idle = 0 if position > before else num_idle + 1
            if num_idle >= MAX_IDLE_ATTEMPTS:
                raise StorageError(
                    f"{self}/{path}: {reason}; {position:,} bytes are here after {num_idle} "
                    "attempts that brought nothing; run the same command again to go on"
                )
            if num_idle:
                time.sleep(self._retry_s * 2 ** (num_idle - 1))

    def _attempt(self, path: str, start: int) -> Iterator[bytes]:
        """What one connection brings of the bytes from ``start`` on."""
        url = self._url.copy_with(path=f"{self._url.raw_path.decode().rstrip('/')}/{quote(path)}")
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._client.stream("GET", url, headers=headers) as response:
            if response.status_code in TRY_AGAIN:
                raise httpx.NetworkError(f"the server answers {response.status_code}")
            num_to_skip = self._num_to_skip(path, start, response)
            for chunk in response.iter_raw():
                if len(chunk) > num_to_skip:
                    yield chunk[num_to_skip:]
                num_to_skip = max(0, num_to_skip - len(chunk))

    def _num_to_skip(self, path: str, start: int, response: httpx.Response) -> int:
        """Bytes before the wanted ones in the answer. Raises where it is not the file."""
        status, where = response.status_code, f"{self}/{path}"
        if status == NOT_FOUND:
            raise FileNotFoundError(where)
        if status == BAD_RANGE:
            raise BundleError(f"{where} is shorter than the manifest says")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise BundleError(f"{where}: the server compresses what it sends; switch that off")
        if status == OK:
            return start
        found = response.headers.get("Content-Range", "")
        if status == PARTIAL and found.startswith(f"bytes {start}-"):
            return 0
        elsewhere = shown(response.headers.get("Location", found), MAX_HEADER_CHARS)
        raise BundleError(f"{where}: the server answers {status} {elsewhere}; expected the file")


def _without_password(url: str) -> str:
    """An address that cannot be parsed, without what stands before an @."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


class HttpSource:
    """A bundle behind a URL."""

    def __init__(self, store: HttpStore, path: str) -> None:
        self._store = store
        self._path = path

    def __str__(self) -> str:
        return f"{self._store}/{self._path}"

    def manifest(self) -> dict[str, Any]:
        """The manifest. Raises InputError where there is no such bundle."""
        content = self._store.get(f"{self._path}/{consumer.MANIFEST}")
        if content is None:
            raise InputError(f"there is no bundle {self}; check the name and the version")
        try:
            return consumer.parse_manifest(content)
        except consumer.RefusedBundleError as error:
            raise BundleError(f"{self}: {error}") from error

    def refuse_additions(self, manifest: Mapping[str, Any]) -> None:
        """Nothing can be added: only what the manifest names is asked for."""

    def read(self, name: str, start: int, size_bytes: int) -> Iterator[bytes]:
        """Its bytes, over as many connections as it takes."""
        try:
            yield from self._store.stream(f"{self._path}/{name}", start, size_bytes)
        except FileNotFoundError:
            raise BundleError(f"{self}: {name} is missing; the manifest names it") from None
