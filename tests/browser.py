"""A real browser without a window, for the tests of the pages; they are skipped only where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def started() -> Iterator:
    """The browser of this machine, driven by Playwright."""
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser on this machine ({', '.join(NAMES)})")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser
        browser.close()
