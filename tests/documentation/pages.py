"""Markdown pages: their headings, links, and tables of fields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
INCLUDE = re.compile(r"^```\{include\} (\S+)", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
SOURCE = re.compile(
    r"(?:training|tasks|flows|holdfast|tests|benchmarks|deployments|docs)/[\w./-]*[\w/]"
)


def pages(repository: Path = REPOSITORY) -> list[Path]:
    """Every page of the documentation."""
    return sorted([*repository.glob("*.md"), *repository.glob("docs/**/*.md")])


def anchors(page: Path) -> set[str]:
    """Names by which headings of a page can be linked to, of those it includes as well."""
    text = page.read_text(encoding="utf-8")
    found = {_slug(heading) for heading in HEADING.findall(FENCE.sub("", text))}
    for name in INCLUDE.findall(text):
        found |= anchors(page.parent / name)
    return found


def dead_links(page: Path) -> list[str]:
    """Links to files that are not there, and to headings that are not in them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in LINK.findall(text) if not _is_alive(page, link)]


def dead_paths(page: Path, repository: Path = REPOSITORY) -> list[str]:
    """Code in a text that looks like a path of the repository, and is none."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = [code for code in CODE.findall(text) if SOURCE.fullmatch(code)]
    return [path for path in named if not (repository / path).exists()]


def field_tables(page: Path) -> dict[str, list[str]]:
    """Names in the first column of the table below each ``<!-- fields: NAME -->``."""
    return dict(_tables(page.read_text(encoding="utf-8"), "fields"))


def file_tables(page: Path) -> dict[str, list[str]]:
    """As ``field_tables``, of ``<!-- files: NAME -->``."""
    return dict(_tables(page.read_text(encoding="utf-8"), "files"))


def _tables(text: str, kind: str) -> Iterator[tuple[str, list[str]]]:
    marked = re.findall(rf"<!-- {kind}: (.+?) -->\n((?:\|.*\n)+)", text)
    for name, table in marked:
        rows = table.splitlines()[2:]
        yield name, [code for row in rows for code in CODE.findall(row.split("|")[1])]


def _is_alive(page: Path, link: str) -> bool:
    if re.match(r"[a-z]+:", link):
        return link.startswith(("https:", "http:"))
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return target.exists() and (not anchor or anchor in anchors(target))


def _slug(heading: str) -> str:
    """As repository hosts and the site make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
