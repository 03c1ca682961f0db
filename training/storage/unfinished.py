"""Parts of uploads that never ended. A killed process leaves them; no list shows them; they cost.

Obstore does not list them. On S3 boto3 does, where the extra is installed; Google and Azure are
left to their own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from holdfast.training.errors import InputError, StorageError
from holdfast.training.storage.address import Address
from holdfast.training.storage.credentials import endpoint, region, required_module

Answer = TypeVar("Answer")
UNSEEN = {
    "gs": "a lifecycle rule AbortIncompleteMultipartUpload of the bucket deletes them",
    "az": "Azure deletes them after a week",
}


@dataclass(frozen=True)
class Unfinished:
    """One upload that was begun and neither completed nor given up.

    Attributes:
        key: as the server has it, with the store's prefix.
        begun_s: Unix time on the server's clock.
        size_bytes: of the parts that are there.
    """

    key: str
    upload_id: str
    begun_s: float
    size_bytes: int


class UnfinishedUploads:
    """Those of one store. Raises InputError where they cannot be looked for, and says why."""

    def __init__(self, address: Address) -> None:
        if address.scheme != "s3":
            raise InputError(
                f"parts of unfinished uploads are not looked for: {UNSEEN[address.scheme]}"
            )
        boto3 = required_module("boto3", "aws", "to look for parts of unfinished uploads one")
        self._address = address
        self._client = boto3.client(
            "s3", endpoint_url=endpoint() or None, region_name=region() or None
        )

    def list(self) -> list[Unfinished]:
        """All of them. Raises StorageError."""
        return self._asked("list", lambda: list(self._found()), [])

    def abandon(self, upload: Unfinished) -> None:
        """Delete its parts; one that is gone is no error. Raises StorageError."""
        self._asked("delete", lambda: self._abort(upload), None)

    def _found(self) -> Iterator[Unfinished]:
        bucket, prefix = self._address.bucket, self._address.prefix
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=bucket, Prefix=f"{prefix}/" if prefix else ""
        )
        for page in pages:
            for entry in page.get("Uploads", ()):
                key, upload_id = entry["Key"], entry["UploadId"]
                parts = self._client.get_paginator("list_parts").paginate(
                    Bucket=bucket, Key=key, UploadId=upload_id
                )
                sizes = [part["Size"] for found in parts for part in found.get("Parts", ())]
                yield Unfinished(key, upload_id, entry["Initiated"].timestamp(), sum(sizes))

    def _abort(self, upload: Unfinished) -> None:
        self._client.abort_multipart_upload(
            Bucket=self._address.bucket, Key=upload.key, UploadId=upload.upload_id
        )

    def _asked(self, action: str, ask: Callable[[], Answer], gone: Answer) -> Answer:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return ask()
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "no code"))[:60]
            if code == "NoSuchUpload":
                return gone
            raise StorageError(
                f"cannot {action} unfinished uploads of {self._address}: the server answers {code}"
            ) from None
        except BotoCoreError as error:
            raise StorageError(
                f"cannot {action} unfinished uploads of {self._address}: {type(error).__name__}"
            ) from None
