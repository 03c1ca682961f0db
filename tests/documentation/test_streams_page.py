"""The experiment of docs/streams.md goes through its rehearsal, on tars as it wants them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

from tests.documentation.pages import REPOSITORY
from tests.training.rehearsal.test_acts import found

PAGE = REPOSITORY / "docs" / "streams.md"
EXAMPLE = re.compile(r"<!-- tested: my_captions.py -->\n```python\n(.*?)```", re.DOTALL)


def write(path: Path, num: int) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as archive:
        for number in range(num):
            point = json.dumps({"point": [number % 7 / 7, number % 2 - 0.5, 1.0]}).encode()
            for suffix, content in (("json", point), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_the_experiment_of_the_page_is_fit_for_training(tmp_path: Path) -> None:
    [source] = EXAMPLE.findall(PAGE.read_text())
    (tmp_path / "my_captions.py").write_text(source)
    for split in ("train", "validation", "test"):
        write(tmp_path / "data" / split / "part-0.tar", 40)
    experiment = f"{tmp_path / 'my_captions.py'}:Captions"
    findings = found(experiment, tmp_path, f"data.folder={tmp_path / 'data'}")
    assert [one for one in findings if one.severity != "note"] == []
