"""An object store of a cloud, through obstore. Imported by ``opening`` alone, and late.

What obstore does is tried again by obstore. What is left over gets a type here: its own errors hold
the address that was asked for and the server's answer, in which credentials may stand (Azure's are
in the query), so only the status and the server's code are passed on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PreconditionError,
)
from obstore.store import AzureStore, GCSStore, S3Store

from holdfast.training.errors import InputError, StorageError
from holdfast.training.storage.address import Address
from holdfast.training.storage.credentials import endpoint, first_named, found_credentials, region
from holdfast.training.storage.protocol import (
    PART_BYTES,
    Bytes,
    Expected,
    Listed,
    Listing,
    Object,
    Unchanged,
)

if TYPE_CHECKING:
    from obstore.store import S3Config

SMALL_TIMEOUT_S = 10.0
BULK_TIMEOUT_S = 120.0
"""Of one request: eight parts at once need 0.6 MB/s for it."""
RETRY_S = 30.0
RETRY_BULK_S = 180.0
MAX_RETRIES = 10
MAX_BACKOFF_S = 4.0
"""A fifth of a lease: who was cut off renews it soon after the server is back."""
MAX_UNANSWERED = 3
PARTS_AT_ONCE = 8
OTHER_ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")
STATUS = re.compile(r"(?:status|code)\D{0,12}\b([2-5][0-9]{2})\b", re.IGNORECASE)
"""Of a final answer; the codes of a network that does not get there are below 200."""
CODE = re.compile(r"<Code>([A-Za-z]{3,60})</Code>")
METADATA = re.compile(r"//(169\.254\.|metadata\.google\.internal)|/latest/(api|meta-data)/")
"""In an address that is asked who this machine is."""
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
WRONG_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint")
NEEDED = {"az": "; AZURE_STORAGE_ACCOUNT_NAME says which account"}
REDIRECTED = "incorrectly configured region"
"""In obstore's words of a server that names another place and does not say which."""
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
RENEWED = (*EXPIRED, "InvalidAccessKeyId", "InvalidToken")
"""Others may lie where these were found."""
SKEWED = ("RequestTimeTooSkewed",)
HAPPENS_AGAIN = (OSError, BaseError)


class Bucket:
    """Objects below the prefix of a bucket; see ``ObjectStore``.

    Attributes:
        has_checksums: S3 compares each part with its SHA-256; to the others obstore sends none.
    """

    has_checksums: bool

    def __init__(self, address: Address) -> None:
        """Opens nothing yet. Raises InputError where the environment cannot be a configuration."""
        self._address = address
        self.has_checksums = address.scheme == "s3"
        self._credentials = found_credentials(address.scheme)
        try:
            self._open()
        except (BaseError, ValueError) as error:
            told = str(error).splitlines()[0][:200] if isinstance(error, BaseError) else "a value"
            raise InputError(
                f"{address} cannot be opened with what the environment says: "
                f"{_without_values(told)}{NEEDED.get(address.scheme, '')}"
            ) from None

    def _open(self) -> None:
        """Credentials are looked for anew by whoever opens."""
        self._small = self._opened(SMALL_TIMEOUT_S, RETRY_S)
        self._bulk = self._opened(BULK_TIMEOUT_S, RETRY_BULK_S)

    def get(self, key: str, start: int = 0, end: int | None = None) -> Object | None:
        """As ``ObjectStore.get``."""
        options: dict[str, Any] = {}
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        store = self._small if end is None else self._bulk
        try:
            found = obstore.get(store, key, options=options or None)  # type: ignore[arg-type]
            tag = self._tag(found.meta)
            return Object(bytes(found.bytes()), tag)
        except FileNotFoundError as error:
            self._require_bucket(error, "read", key)
            return None
        except HAPPENS_AGAIN as error:
            self._refuse(error, "read", key)

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        """As ``ObjectStore.put``."""
        for attempt in range(1, MAX_UNANSWERED + 1):
            try:
                tag = self._put_once(key, content, expected)
            except HAPPENS_AGAIN as error:
                is_settled, tag = self._after_no_answer(key, content, expected)
                if not is_settled:
                    if attempt < MAX_UNANSWERED and type(error) is GenericError:
                        continue  # a write on a condition is not tried again by the client
                    self._refuse(error, "write", key)
            return tag
        raise AssertionError

    def _put_once(self, key: str, content: bytes, expected: Expected) -> str | None:
        mode: Any = "overwrite"
        if expected == "absent":
            mode = "create"
        elif isinstance(expected, Unchanged):
            mode = self._update(expected.tag)
        try:
            return self._tag(obstore.put(self._small, key, content, mode=mode, use_multipart=False))
        except (AlreadyExistsError, PreconditionError):
            return self._own_tag(key, content)
        except FileNotFoundError as error:
            self._require_bucket(error, "write", key)
            if isinstance(expected, Unchanged):  # what was to be swapped is gone
                return None
            self._refuse(error, "write", key)

    def _after_no_answer(
        self, key: str, content: bytes, expected: Expected
    ) -> tuple[bool, str | None]:
        """Whether it is known what became of a write, and what ``put`` returns then.

        One that still waits somewhere does no harm later: its condition will not hold any more.
        """
        try:
            found = self.get(key)
        except StorageError:
            return False, None
        if found is not None and found.content == content:
            return True, found.tag
        if expected == "absent":
            return found is not None, None
        if isinstance(expected, Unchanged):
            return found is None or found.tag != expected.tag, None
        return False, None

    def upload(self, key: str, parts: Iterable[Bytes]) -> None:
        """As ``ObjectStore.upload``."""
        try:
            obstore.put(
                self._bulk,
                key,
                iter(parts),
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )
        except HAPPENS_AGAIN as error:
            self._refuse(error, "upload", key)

    def list(self, prefix: str) -> Listing:
        """As ``ObjectStore.list``."""
        found: Listing = []
        try:
            for some in obstore.list(self._small, prefix or None):
                found += [
                    Listed(
                        entry["path"],
                        entry["size"],
                        self._tag(entry),
                        entry["last_modified"].timestamp(),
                    )
                    for entry in some
                ]
        except HAPPENS_AGAIN as error:
            self._refuse(error, "list", prefix)
        return sorted(found, key=lambda entry: entry.key)

    def delete(self, keys: Sequence[str]) -> None:
        """As ``ObjectStore.delete``."""
        if self._address.scheme != "s3":
            for key in keys:  # one that is missing must not keep the others
                self._delete(key)
            return
        for first in range(0, len(keys), 1000):
            self._delete(list(keys[first : first + 1000]))

    def _delete(self, keys: str | Sequence[str]) -> None:
        try:
            obstore.delete(self._small, keys)
        except FileNotFoundError as error:
            self._require_bucket(error, "delete", str(keys))
        except HAPPENS_AGAIN as error:
            self._refuse(error, "delete", keys if isinstance(keys, str) else keys[0])

    def _tag(self, told: Any) -> str:
        """Google's generation, or the entity tag of the others, which Azure lists without marks."""
        if self._address.scheme == "gs":
            return str(told.get("version") or "")
        tag = str(told.get("e_tag") or "")
        return f'"{tag}"' if tag and self._address.scheme == "az" and tag[0] != '"' else tag

    def _update(self, tag: str) -> dict[str, str]:
        return {"version": tag} if self._address.scheme == "gs" else {"e_tag": tag}

    def _own_tag(self, key: str, content: bytes) -> str | None:
        """The tag of an object that holds just these bytes: it was our write that made it."""
        found = self.get(key)
        return found.tag if found is not None and found.content == content else None

    def _require_bucket(self, error: Exception, action: str, key: str) -> None:
        """Raise where it is not the object that is missing, but all of it."""
        if any(code in str(error) for code in NO_BUCKET):
            self._refuse(error, action, key)

    def _refuse(self, error: Exception, action: str, key: str) -> NoReturn:
        """Raise ``error`` with a type of ours, without what could be secret in it."""
        told = str(error)
        code = CODE.search(told)
        name = code[1] if code else next((one for one in NO_BUCKET if one in told), "")
        if name in NO_BUCKET:
            raise InputError(
                f"{self._address}: there is no bucket {self._address.bucket!r} here "
                f"({_where(self._address.scheme)}): check its name, or make it"
            ) from None
        if name in WRONG_REGION or REDIRECTED in told:
            raise InputError(
                f"{self._address}: the bucket is in another region ({name or 'redirected'}); "
                f"{_where(self._address.scheme)}: set AWS_REGION to the bucket's"
            ) from None
        status = STATUS.search(told)
        answer = " ".join(filter(None, (status[1] if status else "", name)))
        if name in RENEWED:
            self._open()
        problem = self._credentials.problem if self._credentials is not None else ""
        raise StorageError(
            f"cannot {action} {self._address}/{key}: {problem or _meaning(error, name, answer)}"
        ) from None

    def _opened(self, timeout_s: float, retry_s: float) -> S3Store | GCSStore | AzureStore:
        address = self._address
        common: dict[str, Any] = {
            "prefix": address.prefix or None,
            "client_options": {
                "timeout": timedelta(seconds=timeout_s),
                "connect_timeout": timedelta(seconds=5),
                "allow_http": _may_be_http(),
            },
            "retry_config": {
                "max_retries": MAX_RETRIES,
                "retry_timeout": timedelta(seconds=retry_s),
                "backoff": {
                    "init_backoff": timedelta(seconds=0.1),
                    "max_backoff": timedelta(seconds=MAX_BACKOFF_S),
                    "base": 2,
                },
            },
        }
        if self._credentials is not None:
            common["credential_provider"] = self._credentials
        if address.scheme == "s3":
            config: dict[str, Any] = {"checksum_algorithm": "SHA256"}
            config |= {"endpoint": named} if (named := endpoint()) else {}
            config |= {"region": named} if (named := region()) else {}
            return S3Store(address.bucket, config=cast("S3Config", config), **common)
        if address.scheme == "gs":
            return GCSStore(address.bucket, **common)
        return AzureStore(address.bucket, **common)


def _may_be_http() -> bool:
    """Whether a server that was named by hand, as one of a test, is asked without encryption."""
    named = (endpoint(), *(os.environ.get(name, "") for name in OTHER_ENDPOINTS))
    return any(one.startswith("http://") for one in named) or _is_emulated()


def _is_emulated() -> bool:
    told = os.environ.get("AZURE_STORAGE_USE_EMULATOR", "")
    return told.lower() in ("1", "true")


def _where(scheme: str) -> str:
    named = endpoint() if scheme == "s3" else first_named(OTHER_ENDPOINTS)
    place = named.rpartition("@")[2].partition("?")[0]
    if place or scheme != "s3":
        return f"the server is {place or 'the cloud itself'}"
    return f"the region is {region() or 'not set'}"


def _meaning(error: Exception, name: str, answer: str) -> str:
    if name in EXPIRED:
        return f"the credentials have expired ({answer}); renew them and go on"
    if name in SKEWED:
        return f"this machine's clock is wrong ({answer}); set it, as NTP does"
    if METADATA.search(str(error)):
        return (
            "no credentials were found: neither the environment, nor a profile or file, nor this "
            "machine has any; docs/buckets.md says where they are looked for"
        )
    kind = type(error).__name__
    is_denied = answer.startswith(("401", "403"))
    if is_denied or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return f"the server does not allow it ({answer or kind}); check credentials and rights"
    if answer:
        return f"the server answers {answer}"
    return "the server does not answer in time, or its answer is cut; check that it can be reached"


def _without_values(told: str) -> str:
    """A message about the configuration, without what stands in quotation marks or after =."""
    return re.sub(r"(\"[^\"]*\"|'[^']*'|=\s*\S+)", "…", told)
