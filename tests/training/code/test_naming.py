"""How a script names its run, without running it."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.code.naming import named_run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import holdfast\nrun = holdfast.run('gpt', 'first', seed=1)", ("gpt", "first")),
        ("import holdfast as h\nwith x: h.run(run_id='first', experiment='gpt')", ("gpt", "first")),
        ("from holdfast import run as begin\ndef main(): begin('gpt', name)", ("gpt", None)),
        ("from holdfast import run\nrun('gpt', f'{a}')", ("gpt", None)),
        ("import holdfast\nmodel.run('gpt', 'first')", (None, None)),
        ("import other\nother.run('gpt', 'first')", (None, None)),
        ("no python at all", (None, None)),
        ("", (None, None)),
    ],
)
def test_names_are_read_where_they_are_plain(
    tmp_path: Path, text: str, expected: tuple[str | None, str | None]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(text)
    assert named_run(script) == expected


def test_a_file_that_is_not_there_names_nothing(tmp_path: Path) -> None:
    assert named_run(tmp_path / "train.py") == (None, None)
