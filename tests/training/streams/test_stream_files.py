from __future__ import annotations

import os
import pickle
import tarfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from holdfast.training.data.batch_plan import FixedSizePlan
from holdfast.training.data.fetching import Shares
from holdfast.training.data.loader import Loader, Microbatch
from holdfast.training.data.own_order import own_permutation
from holdfast.training.errors import DataFormatError, DataNotFoundError
from holdfast.training.streams import index
from holdfast.training.streams.stream_files import MAX_OPEN_FILES, StreamFiles
from tests.training.streams.stream_writers import (
    WRITERS,
    number_of,
    write_folder,
    write_lines,
    write_tar,
)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture(params=WRITERS)
def suffix(request: pytest.FixtureRequest) -> str:
    if request.param == ".parquet":
        pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    return str(request.param)


def test_every_sample_is_there_by_its_number(tmp_path: Path, suffix: str) -> None:
    num = write_folder(tmp_path / "data", suffix)
    found = StreamFiles(tmp_path / "data", number_of)
    assert [found[number] for number in range(num)] == list(range(num))
    assert found.fetch([7, 0, 17, 7]).tolist() == [7, 0, 17, 7]
    assert pickle.loads(pickle.dumps(found)).fetch([3, 2]).tolist() == [3, 2]
    with pytest.raises(IndexError):
        found[num]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_form_are_read(tmp_path: Path, form: int) -> None:
    write_tar(tmp_path / "one.tar", range(7), form)
    found = StreamFiles(tmp_path / "one.tar")
    assert [found[n]["txt"] for n in range(7)] == [f"text {n}".encode() for n in range(7)]
    with tarfile.open(tmp_path / "one.tar") as archive:
        names = [name.rpartition(".")[0] for name in archive.getnames()[::2]]
    assert [found[n]["__key__"] for n in range(7)] == names


def test_the_index_is_built_once_and_kept_where_it_can_be_written(
    tmp_path: Path, scratch: Path
) -> None:
    data = tmp_path / "data"
    write_folder(data, ".jsonl")
    first = StreamFiles(data).index
    assert first.folder == data / index.FOLDER
    before = (first.folder / index.INDEX).stat().st_mtime_ns
    assert StreamFiles(data).index == first
    assert (first.folder / index.INDEX).stat().st_mtime_ns == before
    (tmp_path / "file").write_text("")
    kept = index.kept([tmp_path / "file" / "no folder", scratch / "index"], first.files,
                      first.places())  # fmt: skip
    assert kept.folder == scratch / "index"
    assert kept.fingerprint == first.fingerprint
    assert np.array_equal(kept.places(), first.places())


def test_a_file_that_was_touched_is_the_same_and_one_that_was_changed_is_not(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path, ".jsonl")
    StreamFiles(tmp_path)
    path = tmp_path / "part-2.jsonl"
    os.utime(path, (1, 1))
    StreamFiles(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"8", b"9"))
    with pytest.raises(DataFormatError, match=r"part-2\.jsonl was changed since its index was"):
        StreamFiles(tmp_path)
    path.unlink()
    with pytest.raises(DataNotFoundError, match=r"part-2\.jsonl is missing, and the index"):
        StreamFiles(tmp_path)
    write_folder(tmp_path, ".jsonl")
    StreamFiles(tmp_path)
    write_lines(tmp_path / "new.jsonl", [1])
    with pytest.raises(DataFormatError, match=r"new\.jsonl is not in the index .* delete the"):
        StreamFiles(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (index.INDEX, b'{"version": 2}', r"index of version 2, and this program reads 1: delete"),
        (index.INDEX, b"[]", r"index of version None"),
        (index.INDEX, b"{", r"is no index of stream files.* delete it"),
        (index.INDEX, b'{"version": 1, "files": 3}', r"is no index of stream files"),
        (index.PLACES, b"", r"is no index of stream files, places\.npy has another digest"),
    ],
)
def test_an_index_that_is_none_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    write_folder(tmp_path, ".jsonl")
    StreamFiles(tmp_path)
    (tmp_path / index.FOLDER / name).write_bytes(content)
    with pytest.raises(DataFormatError, match=message) as caught:
        StreamFiles(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_truncated_is_named(tmp_path: Path, suffix: str) -> None:
    if suffix == ".jsonl":
        pytest.skip("any beginning of it is as good a file")
    write_folder(tmp_path, suffix)
    path = tmp_path / f"part-2{suffix}"
    content = path.read_bytes()
    for length in (len(content) // 2, 300, 2):
        path.write_bytes(content[:length])
        with pytest.raises(DataFormatError, match=rf"part-2\{suffix}.* truncated") as caught:
            StreamFiles(tmp_path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / index.FOLDER).exists()


def test_a_sample_that_cannot_be_decoded_is_named_with_its_file_and_place(tmp_path: Path) -> None:
    write_folder(tmp_path, ".jsonl")
    path = tmp_path / "part-2.jsonl"
    path.write_text('{"number": 1}\n{"number": \n')
    found = StreamFiles(tmp_path, number_of)
    with pytest.raises(
        DataFormatError, match=r"sample 1 of .*part-2.jsonl \(place 14, 26\) can"
    ) as e:
        found.fetch([0, 7])
    assert "cannot be decoded" in str(e.value)
    (tmp_path / "part-3.jsonl").unlink()
    with pytest.raises(DataNotFoundError, match=r"part-3\.jsonl is missing; it was there"):
        found.fetch([9])
    path.write_text("")
    with pytest.raises(DataFormatError, match=r"sample 0 of .* the file ends at byte 0.* trunc"):
        StreamFiles.fetch(pickle.loads(pickle.dumps(found)), [6])


def test_no_stream_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"nowhere does not exist; expected files that end"):
        StreamFiles(tmp_path / "nowhere")
    (tmp_path / "read.me").write_text("")
    with pytest.raises(DataNotFoundError, match="has none"):
        StreamFiles(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataFormatError, match="no samples at all"):
        StreamFiles(tmp_path)


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    num = write_folder(tmp_path, ".jsonl", [2] * (3 * MAX_OPEN_FILES))
    found = StreamFiles(tmp_path, number_of)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert sorted(found.fetch(range(num)).tolist()) == list(range(num))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + MAX_OPEN_FILES + 1


def stream_loader(folder: Path, num_workers: int, shares: Shares | None = None) -> Loader:
    dataset = StreamFiles(folder, number_of, window=16)
    plan = FixedSizePlan(len(dataset), 4, False, 3, own_permutation(dataset))
    return Loader(dataset, plan, num_workers=num_workers, seed=3, shares=shares)


def numbers(batches: list[Microbatch]) -> list[list[int]]:
    return [[] if batch.batch is None else batch.batch.tolist() for batch in batches]


def test_batches_are_the_same_from_any_place_with_any_number_of_processes(tmp_path: Path) -> None:
    num = write_folder(tmp_path, ".tar", (30, 7, 20, 11, 1))
    steps = -(-num // 4)
    loader = stream_loader(tmp_path, 0)
    calm = loader.steps(0, 0)
    whole = numbers([next(calm) for _ in range(2 * steps)])
    assert sorted(chain(*whole[:steps])) == list(range(num))
    assert whole[:steps] != whole[steps:]
    for num_workers in (0, 2):
        for start in (5, steps - 1):
            again = stream_loader(tmp_path, num_workers)
            resumed = again.steps(0, start)
            found = numbers([next(resumed) for _ in range(steps)])
            again.close()
            assert found == whole[start : start + steps]
    ranks = [stream_loader(tmp_path, 0, Shares(4, rank, 2)).steps(0, 0) for rank in range(2)]
    for step in range(steps):
        parts = [
            numbers([next(rank) for _ in range(2 if step < steps - 1 else 1)]) for rank in ranks
        ]
        assert [*chain(*chain(*parts))] == whole[step]
