from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.checkpointing.digests import HASHERS, digest_of, new_hasher
from holdfast.training.errors import CheckpointCorruptError


@pytest.mark.parametrize("algorithm", HASHERS)
@given(st.lists(st.binary()))
def test_a_digest_does_not_depend_on_where_the_parts_end(
    algorithm: str, parts: list[bytes]
) -> None:
    assert digest_of(parts, algorithm) == digest_of([b"".join(parts)], algorithm)


def test_a_digest_names_its_algorithm() -> None:
    assert digest_of([b"abc"]) == (
        "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    )
    assert digest_of([b"abc"], "sha256") == f"sha256:{hashlib.sha256(b'abc').hexdigest()}"


def test_an_unknown_algorithm_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(CheckpointCorruptError, match=r"'crc9'; .* knows \['blake3', 'sha256'\]"):
        new_hasher("crc9")
