"""The site of the documentation: it is built without a warning, whole, and needs no network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast
from tests.documentation.pages import REPOSITORY

DOCS = REPOSITORY / "docs"
FOREIGN = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]*\"")


def build(docs: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """As ``make docs`` does it."""
    argv = [sys.executable, "-P", "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    argv += ["-c", str(DOCS / "site"), str(docs), str(site)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False)


pytestmark = pytest.mark.slow  # make docs builds the site, and is part of what a change must pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(DOCS, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    names = sorted(path.stem for path in DOCS.glob("*.md"))
    assert [name for name in names if not (site / f"{name}.html").is_file()] == []
    start = (site / "index.html").read_text()
    navigation = start.partition('class="sidebar-tree"')[2]
    assert [name for name in names if f'href="{name}.html"' not in navigation] == ["index"]


def test_the_start_is_the_readme(site: Path) -> None:
    start = (site / "index.html").read_text()
    assert "never was, bit for bit" in " ".join(start.split())
    assert 'href="selection.html"' in start


def test_the_reference_has_every_public_name(site: Path) -> None:
    reference = (site / "api.html").read_text()
    documented = {
        name.rpartition(".")[2] for name in re.findall(r'id="(holdfast\.[\w.]+)"', reference)
    }
    assert sorted(set(holdfast.__all__) - documented - {"__version__"}) == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.glob("*.html"))
    assert len(pages) > 20
    assert {
        path.name: found for path in pages if (found := FOREIGN.findall(path.read_text()))
    } == {}


def test_a_dead_link_ends_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# One page\n\n[gone](gone.md) [also gone](#gone)\n")
    done = build(docs, tmp_path / "site")
    assert done.returncode != 0
    assert "gone.md" in done.stderr
    assert "'gone'" in done.stderr
