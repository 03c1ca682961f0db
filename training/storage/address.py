"""The address of a store: ``s3://bucket/prefix``, ``gs://…``, ``az://…``. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from holdfast.training.errors import InputError

SCHEMES = {
    "s3": "S3, or a server that speaks as S3 does",
    "gs": "Google Cloud Storage",
    "az": "Azure Blob Storage; the account is in AZURE_STORAGE_ACCOUNT_NAME",
}
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
SEGMENT = re.compile(r"[A-Za-z0-9_=+@.-]{1,255}")
MAX_PREFIX_CHARS = 512
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
FOLDER_SCHEME = "file"
SLIPS = tuple(f"{scheme}:" for scheme in SCHEMES)
"""What a store begins with that somebody meant to be in a bucket, whatever follows."""
EXPECTED = "expected a folder, file:///folder, s3://bucket/prefix, gs://… or az://…"


@dataclass(frozen=True)
class Address:
    """Where a store lies in a bucket; nothing in it is secret.

    Attributes:
        scheme: a key of ``SCHEMES``.
        bucket: name of the bucket, or of Azure's container.
        prefix: what all keys begin with, without a slash at either end; may be empty.
    """

    scheme: str
    bucket: str
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def is_address(store: str) -> bool:
    """Whether a store is named by something else than a path; it may be wrong nevertheless."""
    found = SCHEME.match(store)
    is_other = found is not None and found[1].lower() != FOLDER_SCHEME
    return is_other or store.lower().startswith(SLIPS)


def parse_address(store: str) -> Address:
    """The address that a text is.

    Raises InputError, without repeating what could be a password: no scheme that is known, no
    bucket, a user, a password, a query or a fragment, or a prefix that could be no folder.
    """
    found = SCHEME.match(store)
    scheme = found[1].lower() if found else ""
    if found is None or scheme not in SCHEMES:
        slip = next((one for one in SLIPS if store.lower().startswith(one)), None)
        told = f"{scheme[:40]}://" if found else f"{slip} without //" if slip else "no scheme"
        raise InputError(f"the store begins with {told}; {EXPECTED}")
    rest = store[found.end() :]
    place = rest.split("/")[0]
    if "@" in place or any(mark in rest for mark in "?#"):
        what = "a user or a password" if "@" in place else "a query or a fragment"
        raise InputError(
            f"the address of the {scheme}:// store holds {what}, which do not belong there: write "
            f"{scheme}://bucket/prefix, and leave credentials to the environment"
        )
    bucket = urlsplit(store).netloc
    if not bucket:
        raise InputError(f"store {scheme}:// names no bucket; write {scheme}://bucket/prefix")
    if BUCKET.fullmatch(bucket) is None:
        raise InputError(
            f"{bucket[:80]!r} is no name of a bucket: expected 3 to 222 lower-case letters, "
            "digits, '.', '_' and '-'"
        )
    return Address(scheme, bucket, _checked_prefix(rest[len(place) :], scheme))


def _checked_prefix(path: str, scheme: str) -> str:
    prefix = path.strip("/")
    if len(prefix) > MAX_PREFIX_CHARS:
        raise InputError(f"the prefix of the {scheme}:// store has {len(prefix)} characters")
    for segment in prefix.split("/") if prefix else ():
        if SEGMENT.fullmatch(segment) is None or set(segment) == {"."}:
            raise InputError(
                f"{segment[:80]!r} in the prefix of the {scheme}:// store can be no folder's name: "
                "expected letters, digits, and ._=+@-"
            )
    return prefix


def address_in(path: str | Path) -> str | None:
    """The address that a text, or a path that was made of one, is; None for a folder.

    A path has lost one of the two slashes.
    """
    if isinstance(path, str):
        return path if is_address(path) else None
    scheme, *rest = path.parts or ("",)
    is_one = scheme.endswith(":") and scheme[:-1] in SCHEMES
    return f"{scheme}//{'/'.join(rest)}" if is_one else None
