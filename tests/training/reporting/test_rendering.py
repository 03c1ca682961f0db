"""The report in a real browser: nothing is cut off, nothing is fetched, nothing is blank."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.training.reporting.page import page
from tests.training.reporting.report_pages import full_facts, new_facts

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (400, 1280)
SMALLEST_TEXT_PX = 9.0
LEAST_PICTURE_BYTES = 25_000
"""A picture of an empty page compresses to a fifth of this."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as started:
        # A container's root cannot use Chromium's sandbox; the page is our own.
        running = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    (path / "full.html").write_text(page(full_facts()), encoding="utf-8")
    (path / "new.html").write_text(page(new_facts()), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["full", "new"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_needs_nothing_else(
    browser: Any, folder: Path, width: int, scheme: str, name: str
) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    address = (folder / f"{name}.html").as_uri()
    tab.goto(address)
    picture = tab.screenshot(full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert len(picture) > LEAST_PICTURE_BYTES
    assert requests == [address]
    assert complaints == []
    tab.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_text_of_charts_is_large_enough_and_stays_within_the_page(
    browser: Any, folder: Path, width: int
) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto((folder / "full.html").as_uri())
    boxes = tab.evaluate(
        "[...document.querySelectorAll('svg text')].map(t => {const b = t.getBoundingClientRect();"
        "return [b.left, b.right, b.height, t.textContent]})"
    )
    assert len(boxes) > 50
    assert [box for box in boxes if box[2] < SMALLEST_TEXT_PX] == []
    assert [box for box in boxes if box[0] < 0 or box[1] > width] == []
    tab.close()


def test_no_table_has_to_be_scrolled_on_a_wide_page(browser: Any, folder: Path) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto((folder / "full.html").as_uri())
    widths = tab.evaluate(
        "[...document.querySelectorAll('.scroll')]"
        ".map(t => [t.scrollWidth, t.clientWidth, t.ariaLabel])"
    )
    assert len(widths) >= 6
    assert [pair for pair in widths if pair[0] > pair[1]] == []
    tab.close()


def test_dark_is_dark_and_print_is_light(browser: Any, folder: Path) -> None:
    tab = browser.new_page(color_scheme="dark")
    tab.goto((folder / "full.html").as_uri())
    ground = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(ground) == "rgb(19, 24, 23)"
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate(ground) == "rgb(255, 255, 255)"
    assert tab.pdf(format="A4").startswith(b"%PDF")
    tab.close()
