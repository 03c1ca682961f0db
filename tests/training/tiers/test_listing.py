"""What a list shows of a bucket's runs. The bucket, in memory, remembers what is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from holdfast.tasks.run_summary import summarize, summarize_listed
from holdfast.training.errors import DataFormatError
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.storage.protocol import Listed, Object
from holdfast.training.tiers import listing
from holdfast.training.tiers.head import head_key
from holdfast.training.tiers.listing import listed_runs
from holdfast.training.tiers.tree import INLINE_BYTES
from tests.tasks.test_run_summary import write_segment
from tests.training.tiers.test_replica import NAME, checkpoint, new_run, opened, write
from tests.training.tiers.test_viewing import Remembering

ADDRESS = Address("s3", "runs", "team")
PROMOTION = {"name": "digits", "version": 3, "alias": "champion", "is_promoted": True}


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remembering:
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "scratch"))
    store = Remembering()
    monkeypatch.setattr(listing, "open_store", lambda _: store)
    return store


def begin(run: RunDirectory) -> None:
    write_segment(run, 1, 0, 15)
    write(run, "losses/0001-00000001.f64", bytes(8 * 17))


def interrupt(run: RunDirectory) -> None:
    told = json.loads(run.segment(1).read_text())
    write_segment(run, 2, 10, 20)
    error = {"type": "E", "message": "why", "traceback": "x" * INLINE_BYTES}
    write(run, "segments/0003.json", json.dumps({**told, "number": 3, "error": error}).encode())
    checkpoint(run, 30, 10)
    write(run, "checkpoints/step-00000030/manifest.json", b"{}")


def end(run: RunDirectory) -> None:
    chosen = {"champion": {"name": "best"}, "test": {"metrics": {"accuracy": 0.5}}}
    write(run, "evaluation.json", json.dumps(chosen).encode())
    write(run, "promotion.json", json.dumps({**PROMOTION, "reason": "the first"}).encode())
    write(run, "bundle/manifest.json", b"{}")
    write(run, "report.html", b"<p>")


def test_a_list_shows_what_the_folder_shows(bucket: Remembering, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    states = set()
    with opened(bucket, run) as replica:
        for change in (lambda _: None, begin, interrupt, end):
            for is_written in (False, True):
                change(run)
                if is_written:
                    with Lease.acquire(run, 60.0):
                        replica.bring_up()
                        [listed] = listed_runs(ADDRESS)
                        there = summarize(run)
                else:
                    replica.bring_up()
                    [listed] = listed_runs(ADDRESS)
                    there = summarize(run)
                place = str(run.path)
                expected = json.dumps(there.as_json()).replace(place, f"{ADDRESS}/{NAME}")
                assert json.dumps(summarize_listed(listed, ADDRESS).as_json()) == expected
                states.add(there.state)
    assert states == {"new", "training", "preempted", "completed"}


def test_a_run_that_did_not_change_is_not_read_again(bucket: Remembering, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with opened(bucket, run) as replica:
        replica.finish(1.0)
    bucket.read.clear()
    first = listed_runs(ADDRESS)
    assert bucket.read == ["tree.json"]
    assert listed_runs(ADDRESS) == first
    assert bucket.read == ["tree.json"]
    with opened(bucket, run) as replica:
        end(run)
        replica.finish(1.0)
        bucket.read.clear()
    assert listed_runs(ADDRESS) != first
    assert bucket.read == ["tree.json"]


def test_where_a_list_tells_no_tags_heads_are_read_and_trees_are_not(
    bucket: Remembering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(bucket, new_run(tmp_path)) as replica:
        replica.finish(1.0)
    listed = bucket.list

    def untagged(prefix: str) -> list[Listed]:
        return [Listed(e.key, e.size_bytes, "", e.modified_s) for e in listed(prefix)]

    monkeypatch.setattr(bucket, "list", untagged)
    first = listed_runs(ADDRESS)
    bucket.read.clear()
    assert listed_runs(ADDRESS) == first
    assert bucket.read == []


def test_a_run_that_cannot_be_read_hides_no_other_and_one_that_is_gone_is_forgotten(
    bucket: Remembering, tmp_path: Path
) -> None:
    run = new_run(tmp_path)
    with opened(bucket, run) as replica:
        replica.finish(1.0)
    bucket.put(head_key("digits/broken"), b"{}", "any")
    bucket.put(head_key("digits/.hidden"), b"{}", "any")
    broken, whole = listed_runs(ADDRESS)
    assert (broken.name, whole.name) == ("digits/broken", NAME)
    assert summarize_listed(whole, ADDRESS).state == "new"
    with pytest.raises(DataFormatError, match="the head of digits/broken has no"):
        summarize_listed(broken, ADDRESS)
    bucket.delete([head_key("digits/broken"), head_key(NAME)])
    assert listed_runs(ADDRESS) == []
    assert [*(tmp_path / "scratch").rglob("*.json")] == []


LARGE_RECORD = "segments/0001.json"


def keep_large_record(bucket: Remembering, folder: Path) -> str:
    """A run with a record that does not stand in its tree; the object's key."""
    run = new_run(folder)
    write_segment(run, 1, 0, 15)
    error = {"type": "E", "message": "why", "traceback": "x" * INLINE_BYTES}
    told = {**json.loads(run.segment(1).read_text()), "error": error}
    write(run, LARGE_RECORD, json.dumps(told).encode())
    with opened(bucket, run) as replica:
        replica.finish(1.0)
    [key] = [entry.key for entry in bucket.list("runs") if entry.key.endswith(LARGE_RECORD)]
    bucket.read.clear()
    return key


def test_a_record_that_comes_altered_is_read_again(
    bucket: Remembering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keep_large_record(bucket, tmp_path)
    flips = iter([True])
    get = bucket.get

    def flipped(asked: str, *part: int) -> Object | None:
        found = get(asked, *part)
        if found is None or asked != key or not next(flips, False):
            return found
        return Object(found.content[:-1] + b"?", found.tag)

    monkeypatch.setattr(bucket, "get", flipped)
    [listed] = listed_runs(ADDRESS)
    assert json.loads(listed.texts[LARGE_RECORD])["error"]["message"] == "why"
    assert bucket.read == ["tree.json", LARGE_RECORD, LARGE_RECORD]


def test_a_run_that_lost_an_object_hides_no_other(bucket: Remembering, tmp_path: Path) -> None:
    key = keep_large_record(bucket, tmp_path)
    whole = RunDirectory(tmp_path / "digits" / "whole")
    write(whole, "run.json", (tmp_path / NAME / "run.json").read_bytes())
    with opened(bucket, whole) as replica:
        replica.finish(1.0)
    bucket.delete([key])
    found = {run.name: run for run in listed_runs(ADDRESS)}
    assert summarize_listed(found["digits/whole"], ADDRESS).state == "new"
    with pytest.raises(DataFormatError, match=r"segments/0001\.json is gone, though"):
        summarize_listed(found[NAME], ADDRESS)


def test_what_this_machine_kept_of_a_run_may_be_damaged(
    bucket: Remembering, tmp_path: Path
) -> None:
    with opened(bucket, new_run(tmp_path)) as replica:
        replica.finish(1.0)
    first = listed_runs(ADDRESS)
    [kept] = (tmp_path / "scratch").rglob("first.json")
    kept.write_bytes(b'{"tag": "')
    assert listed_runs(ADDRESS) == first
    shutil.rmtree(tmp_path / "scratch")
    assert listed_runs(ADDRESS) == first
