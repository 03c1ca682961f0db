from __future__ import annotations

import pytest

from holdfast.training.errors import InputError
from holdfast.training.storage.address import is_address, parse_address


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/some/prefix/", "s3://bucket/some/prefix"),
        ("gs://a_bucket.of-ours/x", "gs://a_bucket.of-ours/x"),
        ("az://container/runs=1/@x", "az://container/runs=1/@x"),
    ],
)
def test_an_address_is_written_in_one_way(text: str, written: str) -> None:
    assert str(parse_address(text)) == written
    assert parse_address(written) == parse_address(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("s3:/bucket/prefix", "begins with s3: without //"),
        ("GS:bucket", "begins with gs: without //"),
        ("ftp://host/runs", "begins with ftp://"),
        ("hdfs://host/runs", "begins with hdfs://"),
        ("s3://me:hunter2@bucket/x", "a user or a password"),
        ("s3://hunter2@bucket/x", "a user or a password"),
        ("az://container/x?sig=hunter2", "a query or a fragment"),
        ("s3://bucket/x#hunter2", "a query or a fragment"),
        ("s3://Bucket_with_Capitals", "no name of a bucket"),
        ("s3://bucket:9000/x", "no name of a bucket"),
        ("s3://b", "no name of a bucket"),
        ("s3://bucket/a//b", "no folder's name"),
        ("s3://bucket/../other", "no folder's name"),
        ("s3://bucket/a b", "no folder's name"),
        ("s3://bucket/%2e%2e", "no folder's name"),
        ("s3://bucket/" + "x/" * 400, "800 characters"),
        ("runs", "no scheme"),
    ],
)
def test_what_is_no_address_is_refused_without_a_password(text: str, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_address(text)
    assert expected in str(refused.value).replace("799", "800")
    assert "hunter2" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs", False),
        ("/mnt/runs", False),
        ("file:///runs", False),
        ("s3://b/x", True),
        ("x://", True),
    ],
)
def test_what_is_taken_for_an_address(text: str, expected: bool) -> None:
    assert is_address(text) is expected
