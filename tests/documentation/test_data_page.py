"""The experiment of docs/data.md goes through its rehearsal, exports included."""

from __future__ import annotations

import re
from pathlib import Path

from tests.documentation.pages import REPOSITORY
from tests.training.rehearsal.test_acts import found

PAGE = REPOSITORY / "docs" / "data.md"
EXAMPLE = re.compile(r"<!-- tested: my_texts.py -->\n```python\n(.*?)```", re.DOTALL)


def test_the_experiment_of_the_page_is_fit_for_training_and_exports(tmp_path: Path) -> None:
    [source] = EXAMPLE.findall(PAGE.read_text())
    (tmp_path / "my_texts.py").write_text(source)
    experiment = f"{tmp_path / 'my_texts.py'}:TextTask"
    findings = found(experiment, tmp_path, depth="export")
    assert [one for one in findings if one.severity != "note"] == []


def test_the_orders_of_the_page_are_orders(tmp_path: Path) -> None:
    [source] = EXAMPLE.findall(PAGE.read_text())
    [orders] = re.findall(r"```python\n(class Sequential.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(source + orders, names)
    sequential, curriculum = (names[name]("train") for name in ("Sequential", "Curriculum"))  # type: ignore[operator]
    assert list(sequential.order(0)) == list(range(200))
    assert [len(curriculum.order(epoch)) for epoch in range(4)] == [66, 133, 200, 200]
