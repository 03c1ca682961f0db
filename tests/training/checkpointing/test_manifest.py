from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.manifest import (
    DIGEST_KEY,
    SLICED_VERSION,
    FileEntry,
    Manifest,
    Migration,
    parse_manifest,
    read_manifest,
    verify,
)
from holdfast.training.checkpointing.policy import Kind, Trigger
from holdfast.training.errors import CheckpointCorruptError
from holdfast.training.runs.durable_json import json_bytes
from holdfast.training.runs.paths import RunDirectory
from tests.training.checkpointing.checkpoints import save_steps

MANIFEST = Manifest(
    step=420,
    epoch=3,
    trigger="epoch",
    metrics={"loss": 0.25},
    files={"model.safetensors": FileEntry(size_bytes=10, digest="blake3:00ff")},
    config_digest="abc",
    versions={"torch": "2.13.0"},
    device="cpu",
    created_at="2026-01-31T12:00:00Z",
    segment=2,
)

MANIFESTS = st.builds(
    Manifest,
    step=st.integers(0, 10**12),
    epoch=st.integers(0, 10**6),
    kind=st.sampled_from(get_args(Kind)),
    trigger=st.sampled_from(get_args(Trigger)),
    metrics=st.dictionaries(st.text(max_size=5), st.floats(), max_size=3),
    files=st.dictionaries(
        st.sampled_from(["model.safetensors", "state.json", "optimizer.safetensors"]),
        st.builds(FileEntry, size_bytes=st.integers(0, 2**60), digest=st.just("sha256:0a")),
    ),
    config_digest=st.text(max_size=9),
    config=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
    versions=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    device=st.text(max_size=5),
    created_at=st.text(max_size=5),
    segment=st.integers(0, 10**6),
)


def signed(**changes: Any) -> bytes:
    """A manifest with other fields and the right digest."""
    fields = {**json.loads(MANIFEST.to_bytes()), **changes}
    del fields[DIGEST_KEY]
    return json_bytes({**fields, DIGEST_KEY: digest_of([json_bytes(fields)])})


@given(MANIFESTS)
def test_a_manifest_comes_back_as_it_was_written(manifest: Manifest) -> None:
    found = parse_manifest(manifest.to_bytes(), "manifest.json")
    assert found.to_bytes() == manifest.to_bytes()
    for name, value in manifest.metrics.items():
        same = found.metrics[name] == value or math.isnan(value)
        assert same


@given(st.integers(0, len(MANIFEST.to_bytes()) * 8 - 1))
def test_no_flipped_bit_changes_what_a_manifest_says(position: int) -> None:
    content = bytearray(MANIFEST.to_bytes())
    content[position // 8] ^= 1 << position % 8
    try:
        found = parse_manifest(bytes(content), "manifest.json")
    except CheckpointCorruptError:
        return
    assert found == MANIFEST


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a manifest"),
        (b"[]", "is not a manifest"),
        (b"{}", "is not a manifest"),
        (b"\xff\xfe", "is not a manifest"),
        (b"[" * 100_000, "is not a manifest"),
        (b"\x80\x04\x95\x10", "is not a manifest"),
        (MANIFEST.to_bytes().replace(b"420", b"421"), "was changed: it says its digest is blake3:"),
        (signed(step=-1), r"step: .* found -1"),
        (signed(surprise=1), "surprise: "),
        (signed(kind="half"), "kind: .* found 'half'"),
        (signed(files={"../x.safetensors": {"size_bytes": 1, "digest": "blake3:00"}}), "does not"),
        (signed(files={"evil.pkl": {"size_bytes": 1, "digest": "blake3:00"}}), "hold a file 'evil"),
        (signed(files={"manifest.json": {"size_bytes": 1, "digest": "blake3:00"}}), "does not"),
        (signed(format_version=SLICED_VERSION + 1), "has format version 3, this Holdfast reads"),
        (signed(format_version=0), "has format version 0"),
        (signed(format_version="new"), "is not a manifest"),
    ],
)
def test_what_is_not_a_manifest_is_refused_by_name(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointCorruptError, match=message) as caught:
        parse_manifest(content, "here/manifest.json")
    assert "here/manifest.json" in str(caught.value)


def test_an_older_format_is_migrated_step_by_step() -> None:
    def rename(fields: dict[str, Any]) -> dict[str, Any]:
        return {("step" if key == "iteration" else key): item for key, item in fields.items()}

    fields = json.loads(MANIFEST.to_bytes())
    del fields[DIGEST_KEY]
    fields["iteration"], fields["format_version"] = fields.pop("step"), 0
    content = json_bytes({**fields, DIGEST_KEY: digest_of([json_bytes(fields)])})
    migrations = {0: Migration(manifest=rename, state=lambda parts: parts)}
    assert parse_manifest(content, "m", migrations).step == 420


def test_verify_reads_every_byte_of_a_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits" / "a")
    save_steps(run, 5)
    folder = run.checkpoint(5)
    assert verify(folder) == read_manifest(folder)
    path = folder / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"ema\.safetensors was changed: the manifest"):
        verify(folder)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits" / "a")
    save_steps(run, 5)
    run.checkpoint(5).rename(run.checkpoint(6))
    with pytest.raises(CheckpointCorruptError, match="is of step 5, not of 6"):
        verify(run.checkpoint(6))


def test_a_folder_that_is_missing_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path / "gone")
