"""Reading C-MAPSS files: the format, and what is told where a file is not of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.errors import DataFormatError, DataNotFoundError
from holdfast.training.experiments.turbofan.data import (
    Engines,
    read_test_engines,
    read_training_engines,
    window_rows,
)
from holdfast.training.experiments.turbofan.synthetic import Fleet, main, write_fleet

SMALL = Fleet(num_train=4, num_test=3, shortest_life=40, longest_life=60)


def edit(path: Path, line: int, text: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1] = text
    path.write_text("".join(lines))


def engines_of(lengths: list[int]) -> Engines:
    sizes = np.array(lengths, dtype=np.int64)
    rows = np.arange(sizes.sum(), dtype=np.float64)[:, None] * np.ones((1, 17))
    ids = np.arange(1, len(sizes) + 1)
    return Engines(ids, np.cumsum(sizes) - sizes, sizes, rows, np.zeros(len(sizes)))


def test_training_engines_run_until_they_fail(tmp_path: Path) -> None:
    write_fleet(tmp_path, SMALL)
    engines = read_training_engines(tmp_path, "FD001")
    assert engines.ids.tolist() == [1, 2, 3, 4]
    assert engines.lengths.sum() == len(engines.rows)
    assert engines.rows.shape[1] == 17
    assert not engines.final_rul.any()


def test_test_engines_have_the_lives_that_the_rul_file_gives(tmp_path: Path) -> None:
    write_fleet(tmp_path, SMALL)
    engines = read_test_engines(tmp_path, "FD001")
    stated = [float(line) for line in (tmp_path / "RUL_FD001.txt").read_text().split()]
    assert engines.final_rul.tolist() == stated
    assert engines.lengths[0] == 19


def test_training_opens_no_test_file(tmp_path: Path) -> None:
    _, test, rul = write_fleet(tmp_path, SMALL)
    test.write_text("not opened")
    rul.write_text("not opened")
    assert len(read_training_engines(tmp_path, "FD001").ids) == 4


def test_chosen_engines_keep_their_rows(tmp_path: Path) -> None:
    write_fleet(tmp_path, SMALL)
    engines = read_training_engines(tmp_path, "FD001")
    chosen = engines.chosen(np.array([False, True, False, True]))
    assert chosen.ids.tolist() == [2, 4]
    last = engines.starts[3]
    assert np.array_equal(chosen.rows[chosen.starts[1] :], engines.rows[last:])
    assert chosen.fingerprint() != engines.fingerprint()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    window=st.integers(1, 30),
    data=st.data(),
)
def test_a_window_stays_within_its_engine_and_ends_at_its_cycle(
    lengths: list[int], window: int, data: st.DataObject
) -> None:
    engines = engines_of(lengths)
    engine = data.draw(st.integers(0, len(lengths) - 1))
    cycle = data.draw(st.integers(1, lengths[engine]))
    (rows,) = window_rows(engines, np.array([engine]), np.array([cycle]), window)
    start = engines.starts[engine]
    expected = [max(start, start + cycle - 1 - back) for back in reversed(range(window))]
    assert rows.tolist() == expected


def test_without_a_folder_the_error_says_where_the_data_is_and_how_to_name_it() -> None:
    with pytest.raises(DataNotFoundError, match=r"train_FD003\.txt.*nasa\.gov.*data\.folder=PATH"):
        read_training_engines(None, "FD003")


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"nowhere does not exist.*nasa\.gov"):
        read_training_engines(tmp_path / "nowhere", "FD001")
    write_fleet(tmp_path, SMALL)
    (tmp_path / "RUL_FD001.txt").unlink()
    with pytest.raises(DataNotFoundError, match=r"RUL_FD001\.txt is missing.*does not have it"):
        read_test_engines(tmp_path, "FD001")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 3 0.5\n", r"line 3: expected 26 numbers, found 3 values"),
        ("1 3 " + "0 " * 25 + "\n", r"line 3: expected 26 numbers, found 27 values"),
        ("1 3 0 x " + "0 " * 22 + "\n", r"line 3, column 4: expected a number, found 'x'"),
        ("1 3 0 1_0 " + "0 " * 22 + "\n", r"line 3, column 4: expected a number, found '1_0'"),
        ("1 3 nan " + "0 " * 23 + "\n", r"line 3, column 3: expected a number, found 'nan'"),
        ("1 4 " + "0 " * 24 + "\n", r"line 3: expected engine 1, cycle 3 .* found engine 1, cycle"),
        ("2 1 " + "0 " * 24 + "\n", r"line 4: expected engine 3, cycle 1 .*engine 1, cycle 4"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    train, _, _ = write_fleet(tmp_path, SMALL)
    edit(train, 3, text)
    with pytest.raises(DataFormatError, match=r"train_FD001\.txt, " + message):
        read_training_engines(tmp_path, "FD001")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00binary"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    write_fleet(tmp_path, SMALL)[0].write_bytes(content)
    with pytest.raises(DataFormatError, match=r"train_FD001\.txt.*expected"):
        read_training_engines(tmp_path, "FD001")


def test_blank_lines_are_skipped_and_lines_still_counted_right(tmp_path: Path) -> None:
    train, _, _ = write_fleet(tmp_path, SMALL)
    train.write_text("\n\n" + train.read_text())
    assert len(read_training_engines(tmp_path, "FD001").ids) == 4
    edit(train, 3, "1 7 " + "0 " * 24 + "\n")
    with pytest.raises(DataFormatError, match="line 3: expected engine 1, cycle 1"):
        read_training_engines(tmp_path, "FD001")


def test_a_rul_file_of_another_length_or_sign_is_refused(tmp_path: Path) -> None:
    _, _, rul = write_fleet(tmp_path, SMALL)
    rul.write_text("5\n-3\n7\n")
    with pytest.raises(DataFormatError, match=r"RUL_FD001\.txt, line 2: .*at least 0, found -3"):
        read_test_engines(tmp_path, "FD001")
    rul.write_text("5\n3\n")
    with pytest.raises(DataFormatError, match=r"one line for each of the 3 engines.*found 2"):
        read_test_engines(tmp_path, "FD001")


def test_the_generator_writes_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write_fleet(tmp_path / "a", SMALL)]
    again = [path.read_bytes() for path in write_fleet(tmp_path / "b", SMALL)]
    assert first == again


def test_the_generators_command_names_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path / "made"), "--subset", "FD004", "--num-train", "3", "--num-test", "2"])
    written = capsys.readouterr().out.split()
    assert [Path(name).name for name in written] == [
        "train_FD004.txt",
        "test_FD004.txt",
        "RUL_FD004.txt",
    ]
    assert len(read_training_engines(tmp_path / "made", "FD004").ids) == 3


@pytest.mark.parametrize(("subset", "rows"), [("FD001", (20631, 13096)), ("FD002", (53759, 33991))])
def test_nasas_own_files_have_the_published_sizes(
    shared_data: Path, subset: str, rows: tuple[int, int]
) -> None:
    train = read_training_engines(shared_data / "cmapss", subset)
    test = read_test_engines(shared_data / "cmapss", subset)
    assert (len(train.rows), len(test.rows)) == rows
