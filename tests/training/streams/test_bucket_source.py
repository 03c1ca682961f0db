"""Stream files of a bucket, on a server of S3."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from holdfast.training.errors import DataFormatError, DataNotFoundError, StorageError
from holdfast.training.runs.faultpoints import POINT_VARIABLE
from holdfast.training.storage.address import address_in, parse_address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import PART_BYTES
from holdfast.training.streams import bucket_source
from holdfast.training.streams.index import FOLDER, INDEX, PLACES
from holdfast.training.streams.stream_files import StreamFiles
from tests.contracts.object_servers import make_bucket, moto
from tests.faults.campaign import Training, complete, differences, final_state
from tests.generality.harness import OFTEN, stop_after
from tests.training.streams.stream_writers import number_of, write_folder

pytestmark = pytest.mark.slow
SIZES = (5, 1, 8, 4)
NUM = sum(SIZES)


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with moto() as environment:
        yield environment


@pytest.fixture
def address(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of its own with tars."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "scratch"))
    bucket = f"data-{abs(hash(str(tmp_path))) % 10**9}"
    make_bucket(server, bucket)
    place = f"s3://{bucket}/words/train"
    write_folder(tmp_path / "local", ".tar", SIZES)
    for path in (tmp_path / "local").iterdir():
        put(place, path.name, path.read_bytes())
    return place


def put(place: str, name: str, content: bytes) -> None:
    open_store(parse_address(place)).upload(name, [content])


class Counting:
    """A store that counts what is got of stream files, and may break off."""

    def __init__(self, store: Any, log: list[tuple[str, int]], break_after: int) -> None:
        self.store, self.log, self.left = store, log, break_after

    def get(self, key: str, start: int = 0, end: int | None = None) -> Any:
        if not key.endswith(".tar"):
            return self.store.get(key, start, end)
        if self.left == 0:
            raise StorageError(f"cannot read {key}: the connection broke off")
        self.left -= 1
        self.log.append((key, start))
        return self.store.get(key, start, end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.fixture
def gets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    return counted(monkeypatch)


def counted(monkeypatch: pytest.MonkeyPatch, break_after: int = -1) -> list[tuple[str, int]]:
    log: list[tuple[str, int]] = []
    store = lambda address: Counting(open_store(address), log, break_after)  # noqa: E731
    monkeypatch.setattr(bucket_source, "open_store", store)
    return log


def test_samples_are_those_of_the_files_and_each_file_comes_once(
    address: str, gets: list[tuple[str, int]]
) -> None:
    found = StreamFiles(address, number_of)
    assert found.fetch(range(NUM)).tolist() == list(range(NUM))
    assert len(gets) == len(SIZES)
    again = StreamFiles(Path(address), number_of)  # as data.folder gives it
    assert again.fetch(range(NUM)).tolist() == list(range(NUM))
    assert again.fingerprint == found.fingerprint
    assert len(gets) == len(SIZES)


def test_another_machine_takes_the_index_of_the_bucket_and_downloads_what_it_needs(
    address: str, gets: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = StreamFiles(address)
    gets.clear()
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "other machine"))
    found = StreamFiles(address, number_of)
    assert (found.fingerprint, len(found), gets) == (first.fingerprint, NUM, [])
    assert found[7] == 7
    assert gets == [("part-2.tar", 0)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (INDEX, b'{"version": 2}', r"is an index of version 2, and this program reads 1"),
        (INDEX, b"{", r"is no index of stream files"),
        (PLACES, b"", r"is no index of stream files, places\.npy has another digest"),
    ],
)
def test_an_index_of_the_bucket_that_is_none_is_named_by_its_address(
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    told: str,
) -> None:
    StreamFiles(address)
    put(address, f"{FOLDER}/{name}", content)
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "other machine"))
    with pytest.raises(DataFormatError, match=rf"^s3://[^ ]*/train/\.holdfast-index {told}"):
        StreamFiles(address)


def test_where_a_bucket_cannot_be_written_each_machine_makes_its_own_index(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise StorageError("cannot write .holdfast-index/places.npy: 403 AccessDenied")

    store = open_store(parse_address(address))
    monkeypatch.setattr(type(store), "upload", refused)
    assert StreamFiles(address, number_of)[7] == 7
    assert "cannot be kept there, so that every machine has to read all files" in caplog.text
    assert not store.list(FOLDER)


def test_several_processes_share_one_download(address: str, gets: list[tuple[str, int]]) -> None:
    StreamFiles(address)
    for path in files():
        path.unlink()
    gets.clear()
    readers = [StreamFiles(address, number_of) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda reader: reader.fetch(range(NUM)).tolist(), readers))
    assert found == [list(range(NUM))] * 4
    assert len(gets) == len(SIZES)


def files() -> list[Path]:
    folder = Path(os.environ["HOLDFAST_SCRATCH"])
    return [path for path in folder.rglob("files/*") if path.suffix not in (".lock", ".partial")]


def test_the_cache_is_bounded(address: str, gets: list[tuple[str, int]]) -> None:
    sizes = [file.size_bytes for file in StreamFiles(address).index.files]
    found = StreamFiles(address, number_of, cache_bytes=max(sizes) + 1)
    for number in (0, 6, 17, 0, 6):
        assert found[number] == number
        found._open.clear()
    assert sum(path.stat().st_size for path in files()) <= max(sizes) + 1
    assert len(gets) > len(SIZES)


def test_a_download_that_breaks_off_is_gone_on_with(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    StreamFiles(address)
    for path in files():
        path.unlink()
    monkeypatch.setattr(bucket_source, "PART_BYTES", 1000)
    counted(monkeypatch, break_after=3)
    with pytest.raises(StorageError, match=r"part-0\.tar: the connection broke off"):
        StreamFiles(address, number_of)[0]
    gets = counted(monkeypatch)
    assert StreamFiles(address, number_of)[0] == 0
    assert gets[0] == ("part-0.tar", 3000)
    for path in files():
        path.with_suffix(".partial").write_bytes(b"spoilt")
        path.unlink()
    assert StreamFiles(address, number_of)[0] == 0


def test_what_was_changed_is_refused(address: str, tmp_path: Path) -> None:
    StreamFiles(address)
    for path in files():
        path.unlink()
    content = (tmp_path / "local" / "part-2.tar").read_bytes()
    put(address, "part-2.tar", content.replace(b"text 7", b"text 8"))
    found = StreamFiles(address, number_of)
    assert found[0] == 0
    with pytest.raises(DataFormatError, match=r"part-2\.tar gives other bytes than its index"):
        found[7]
    put(address, "part-2.tar", content[:-512])
    with pytest.raises(DataFormatError, match=r"part-2\.tar has \d+ bytes, and the index says"):
        StreamFiles(address)
    put(address, "part-2.tar", content)
    put(address, "more.tar", content)
    with pytest.raises(DataFormatError, match=r"more\.tar is not in the index"):
        StreamFiles(address)
    store = open_store(parse_address(address))
    store.delete(["more.tar", "part-1.tar"])
    with pytest.raises(DataNotFoundError, match=r"s3://.*/part-1\.tar is missing, and the index"):
        StreamFiles(address)
    store.delete(["part-0.tar", "part-2.tar", "part-3.tar"])
    with pytest.raises(DataNotFoundError, match="there are no stream files in s3://"):
        StreamFiles(address)


def test_a_damaged_object_is_named_by_its_address(address: str) -> None:
    put(address, "bad.tar", b"no tar at all")
    with pytest.raises(DataFormatError, match=r"^s3://.*/bad\.tar: it is truncated"):
        StreamFiles(address)


LARGE_BYTES = 2 * PART_BYTES + 1000  # three parts


def write_large(folder: Path) -> None:
    """Two files of twelve samples, whose download takes several parts."""
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"part-{number}.tar", "w") as archive:
            for sample in range(12 * number, 12 * (number + 1)):
                parts = {"bin": bytes(LARGE_BYTES // 12), "cls": str(sample).encode()}
                for suffix, content in parts.items():
                    member = tarfile.TarInfo(f"{sample:06d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_kills_within_downloads_change_no_byte(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """Whoever downloads is killed between two parts, or before the file has its name; then the
    training between its steps, on another machine.
    """
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    make_bucket(server, f"large-{num_workers}")
    write_large(tmp_path / "local")
    address = f"s3://large-{num_workers}/train"
    for path in (tmp_path / "local").iterdir():
        put(address, path.name, path.read_bytes())
    experiment = f"{Path(__file__).parents[2] / 'generality/test_streams.py'}:FromFiles"
    own = (*OFTEN, "data.batch_size=3", f"data.num_workers={num_workers}")
    calm = Training(tmp_path / "calm", "one", experiment, (*own, f"data.folder={tmp_path}/local"))
    complete(calm)
    killed = Training(tmp_path / "killed", "one", experiment, (*own, f"data.folder={address}"))
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "machine-0"))
    draws = random.Random(num_workers)
    StreamFiles(address)  # its index is there, and its files are not
    for point in ("download.after-part:2", "download.before-rename:1"):
        for path in files():
            path.unlink()
        segment = killed.start({POINT_VARIABLE: point})
        assert segment.finish() in (1, -SIGKILL), "".join(segment.errors)
        # With several loader processes another one may have gone on with the download.
        assert partial() or num_workers > 1, "".join(segment.errors)
    for machine, step in enumerate(sorted(draws.sample(range(2, 20, 3), 3)), 1):
        monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / f"machine-{machine}"))
        stop_after(killed, draws.choice([SIGKILL, SIGTERM]), step)
    complete(killed)
    assert differences(final_state(calm.run), final_state(killed.run)) == []


def partial() -> list[Path]:
    """Downloads that are not done."""
    return [*Path(os.environ["HOLDFAST_SCRATCH"]).rglob("files/*.partial")]


def test_a_path_that_was_an_address_is_one_again() -> None:
    assert address_in(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert address_in("gs://bucket") == "gs://bucket"
    assert address_in(Path("data/s3:")) is None
    assert address_in(Path()) is None
