"""The test server, held request by request to what Google documents of its XML interface."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.contracts.object_servers import google


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with google() as environment:
        yield f"{environment['GOOGLE_BASE_URL']}/battery"


def ask(
    method: str, url: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], str]:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    asked = urllib.request.Request(url, data=body or None, method=method, headers=named)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            told = {key.lower(): value for key, value in answer.headers.items()}
            return answer.status, told, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, {}, error.read().decode()


def test_preconditions(bucket: str) -> None:
    """https://cloud.google.com/storage/docs/request-preconditions"""
    status, first, _ = ask("PUT", f"{bucket}/a", b"one", x_goog_if_generation_match="0")
    assert (status, first["x-goog-generation"].isdecimal()) == (200, True)
    status, _, body = ask("PUT", f"{bucket}/a", b"two", x_goog_if_generation_match="0")
    assert (status, "<Code>PreconditionFailed</Code>" in body) == (412, True)
    generation = first["x-goog-generation"]
    status, second, _ = ask("PUT", f"{bucket}/a", b"two", x_goog_if_generation_match=generation)
    assert status == 200
    assert int(second["x-goog-generation"]) > int(generation)
    assert ask("PUT", f"{bucket}/a", b"3", x_goog_if_generation_match=generation)[0] == 412
    assert ask("PUT", f"{bucket}/none", b"3", x_goog_if_generation_match=generation)[0] == 412


def test_ranges_and_what_is_not_there(bucket: str) -> None:
    """https://cloud.google.com/storage/docs/xml-api/get-object-download"""
    ask("PUT", f"{bucket}/digits", b"0123456789")
    status, told, body = ask("GET", f"{bucket}/digits", Range="bytes=3-6")
    assert (status, body, told["content-range"]) == (206, "3456", "bytes 3-6/10")
    status, _, body = ask("GET", f"{bucket}/nothing")
    assert (status, "<Code>NoSuchKey</Code>" in body) == (404, True)
    status, _, body = ask("GET", bucket.replace("battery", "other") + "/x")
    assert (status, "<Code>NoSuchBucket</Code>" in body) == (404, True)
    assert ask("DELETE", f"{bucket}/digits")[0] == 204
    assert ask("DELETE", f"{bucket}/digits")[0] == 404


def test_multipart_uploads(bucket: str) -> None:
    """https://cloud.google.com/storage/docs/xml-api/post-object-complete"""
    status, _, body = ask("POST", f"{bucket}/large?uploads")
    upload = body.partition("<UploadId>")[2].partition("</UploadId>")[0]
    assert (status, upload != "") == (200, True)
    for number, part in ((1, b"one "), (2, b"two")):
        part_url = f"{bucket}/large?partNumber={number}&uploadId={upload}"
        assert "etag" in ask("PUT", part_url, part)[1]
    assert ask("GET", f"{bucket}/large")[0] == 404
    parts = "".join(f"<Part><PartNumber>{number}</PartNumber></Part>" for number in (1, 2))
    whole = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
    status, told, body = ask("POST", f"{bucket}/large?uploadId={upload}", whole)
    assert (status, "x-goog-generation" in told, "<ETag>" in body) == (200, True, True)
    assert ask("GET", f"{bucket}/large")[2] == "one two"
    assert ask("POST", f"{bucket}/large?uploadId={upload}", whole)[0] == 404


def test_lists_in_pages(bucket: str) -> None:
    """https://cloud.google.com/storage/docs/xml-api/get-bucket-list"""
    for name in ("list/c", "list/a", "list/b"):
        ask("PUT", f"{bucket}/{name}", b"x")
    _, _, first = ask("GET", f"{bucket}?list-type=2&prefix=list/&max-keys=2")
    assert first.count("<Contents>") == 2
    assert "<Key>list/a</Key>" in first
    assert "<IsTruncated>true</IsTruncated>" in first
    token = first.partition("<NextContinuationToken>")[2].partition("</")[0]
    _, _, second = ask("GET", f"{bucket}?list-type=2&prefix=list/&continuation-token={token}")
    assert (second.count("<Contents>"), "<Key>list/c</Key>" in second) == (1, True)
    assert "<IsTruncated>false</IsTruncated>" in second
