"""A Chromium that clicks. Without one, or without playwright, these tests are skipped, and pytest says why; where
BROWSER_TESTS is "required", as `make test-browser` sets it, they fail instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


def leave_out(reason: str) -> None:
    """Skip what needs this, or fail where browser tests were asked for."""
    if os.environ.get("BROWSER_TESTS") == "required":
        pytest.fail(reason, pytrace=False)
    pytest.skip(f"browser tests: {reason}")


def chromium() -> str | None:
    """The program, if one is installed."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@pytest.fixture(scope="module", autouse=True)
def _charts() -> None:
    """Reports are drawn, as they are not where runs are tested."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        leave_out("playwright is not installed; make test-browser installs it")
    if (program := chromium()) is None:
        leave_out(f"there is no Chromium ({', '.join(PROGRAMS)}); on Debian: apt install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Page]:
    """A page that fails its test if a script fails, a dialog opens, or another machine is asked for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"a script failed: {error}"))

    def dismiss(dialog: Dialog) -> None:
        wrong.append(f"a dialog: {dialog.message}")
        dialog.dismiss()  # the page waits for that

    page.on("dialog", dismiss)
    local = ("file:", "data:", "blob:", "http://127.0.0.1:")
    page.on("request", lambda asked: None if asked.url.startswith(local) else wrong.append(f"asked {asked.url}"))
    yield page
    context.close()
    assert not wrong


def on_phone(page: Page) -> None:
    """A window of a phone's size."""
    page.set_viewport_size({"width": 390, "height": 844})


def overflow(page: Page) -> int:
    """By how many pixels a page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def contrast(page: Page, selector: str) -> float:
    """The contrast of a text with what is behind it, 1 to 21 (WCAG 2.2, section 1.4.3 asks for 4.5)."""
    text, behind = page.locator(selector).first.evaluate(
        """element => {
            const text = getComputedStyle(element).color;
            const clear = "rgba(0, 0, 0, 0)";
            while (element.parentElement && getComputedStyle(element).backgroundColor === clear)
                element = element.parentElement;
            return [text, getComputedStyle(element).backgroundColor].map(one => one.match(/[\\d.]+/g).map(Number));
        }"""
    )
    assert len(behind) == 3, f"{selector} has nothing behind it"
    brighter, darker = sorted((luminance(text), luminance(behind)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(color: list[float]) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in color[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
