"""Pieces of HTML. Text goes in as it is and comes out escaped; ``Html`` has been escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from holdfast.training.reporting.wording import NO_VALUE, decimals_for, number
from holdfast.training.runs.shown_text import shown_lines

Cell = str | float | int | None
# What tells times or segments carries this attribute: it differs between a run that was
# interrupted and one that was not, and nothing else on the page does.
VARIES = "data-varies"


class Html(str):
    """Markup: what had to be escaped in it was."""

    __slots__ = ()


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading and its cells. Numbers are aligned by their decimals.

    ``is_right``: cells that are written already, and stand at the right as numbers do.
    """

    heading: str
    cells: Sequence[Cell]
    decimals: int | None = None
    is_right: bool = False

    def written(self) -> list[Html]:
        """The cells as table cells."""
        values = [cell for cell in self.cells if isinstance(cell, float)]
        decimals = decimals_for(values) if self.decimals is None else self.decimals
        return [_written(cell, decimals, self.is_numeric) for cell in self.cells]

    @property
    def is_numeric(self) -> bool:
        """Whether its cells are numbers."""
        found = [cell for cell in self.cells if cell is not None]
        return self.is_right or (
            bool(found) and all(isinstance(cell, (int, float)) for cell in found)
        )


def text(value: str) -> Html:
    """Text, escaped, with the codes of characters that do not print."""
    return Html(escape(shown_lines(value)))


def joined(parts: Sequence[Html]) -> Html:
    """Pieces one after another."""
    return Html("".join(parts))


def element(name: str, content: Html, class_name: str = "", *, varies: bool = False) -> Html:
    """An element around a content."""
    attributes = f' class="{escape(class_name)}"' if class_name else ""
    return Html(f"<{name}{attributes}{' ' + VARIES if varies else ''}>{content}</{name}>")


def table(columns: Sequence[Column], marked_rows: Sequence[int] = (), name: str = "") -> Html:
    """A table that scrolls sideways by itself where the page is too narrow for it.

    Args:
        marked_rows: numbers of the rows that stand out.
        name: what the table shows, for those who do not see it.
    """
    heads = joined(
        [
            Html(f'<th scope="col"{_alignment(column.is_numeric)}>{text(column.heading)}</th>')
            for column in columns
        ]
    )
    rows = zip(*(column.written() for column in columns), strict=True)
    lines = joined(
        [
            element("tr", joined(row), "marked" if number in marked_rows else "")
            for number, row in enumerate(rows)
        ]
    )
    return Html(
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def definitions(pairs: Sequence[tuple[str, Cell]], class_name: str = "") -> Html:
    """Names with their values."""
    rows = [
        Html(f"<div><dt>{text(name)}</dt><dd>{_plain(value, None)}</dd></div>")
        for name, value in pairs
    ]
    return element("dl", joined(rows), class_name)


def section(title: str, content: Html, lead: str = "", *, varies: bool = False) -> Html:
    """A part of the page, with a heading and a sentence that says what it shows."""
    head = element("h2", text(title)) + (element("p", text(lead), "lead") if lead else "")
    return element("section", Html(head + content), varies=varies)


def note(words: str) -> Html:
    """A remark."""
    return element("p", text(words), "note")


def short_digest(digest: str) -> Html:
    """The beginning of a digest; the whole of it is shown where the pointer rests."""
    kind, _, value = digest.rpartition(":")
    shown = f"{kind}:{value[:12]}" if kind else value[:12]
    return Html(f'<code title="{escape(digest)}">{escape(shown)}</code>')


def _written(cell: Cell, decimals: int, is_numeric: bool) -> Html:
    return Html(f"<td{_alignment(is_numeric)}>{_plain(cell, decimals)}</td>")


def _plain(cell: Cell, decimals: int | None) -> Html:
    if cell is None:
        return Html(NO_VALUE)
    if isinstance(cell, float):
        return text(number(cell, decimals))
    if isinstance(cell, int):
        return text(number(cell, 0))
    return cell if isinstance(cell, Html) else text(cell)


def _alignment(is_numeric: bool) -> str:
    return ' class="number"' if is_numeric else ""
