"""Links between pages, to headings and to files of the repository lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documentation.pages import REPOSITORY, anchors, dead_links, dead_paths, pages

PAGES = [path.relative_to(REPOSITORY).as_posix() for path in pages()]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert dead_links(REPOSITORY / page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_paths_that_are_named_are_there(page: str) -> None:
    assert dead_paths(REPOSITORY / page) == []


def test_there_are_pages_with_links() -> None:
    assert "README.md" in PAGES
    assert "docs/formats.md" in PAGES
    assert "a-checkpoint" in anchors(REPOSITORY / "docs/formats.md")


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Some `code.py`, and more\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#some-codepy-and-more) [c](#here) [d](https://x.org)\n# Here\n"
        "[e](gone.md) [f](other.md#gone) [g](#gone) `training/gone.py` `training`\n"
        "```\n[h](in_code.md)\n```\n"
    )
    assert dead_links(page) == ["gone.md", "other.md#gone", "#gone"]
    assert dead_paths(page) == ["training/gone.py"]
