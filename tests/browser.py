"""A Chromium for the test of the chat page: one that is installed, or Playwright's own.

`python -m tests.browser` gets one where there is none, and says so if it cannot.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from playwright.sync_api import Browser, Error, sync_playwright

SECONDS = 600
"""Longest download."""
INSTALL = "playwright install --with-deps --only-shell chromium"
_INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoBrowser(Exception):
    """None can be started. Says why, and how to get one."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless Chromium: that of the variable CHROMIUM, else one of the PATH, else Playwright's.

    asyncio.run does not work in the thread in which it is open.
    """
    found = [path for name in _INSTALLED if (path := shutil.which(name))]
    asked = os.environ.get("CHROMIUM")
    with sync_playwright() as playwright:
        for path in [asked] if asked else [*found, None]:
            try:
                browser = playwright.chromium.launch(executable_path=path)
                break
            except Error as error:
                why = error.message.strip().splitlines()[0].removeprefix("BrowserType.launch: ")
        else:
            raise NoBrowser(f"no Chromium can be started ({why}): install one, or run .venv/bin/{INSTALL}")
        yield browser
        browser.close()


def main() -> None:
    try:
        with open_browser() as browser:
            print(f"Chromium {browser.version} is there for the test of the chat page.")
            return
    except NoBrowser:
        print("Getting Chromium for the test of the chat page.", flush=True)
    # Into this user's cache alone; the system's libraries are left to whoever may install them.
    impatient = {"PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT": "10000", **os.environ}
    words = [sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(words, env=impatient, stderr=subprocess.DEVNULL, timeout=SECONDS)
    try:
        with open_browser():
            pass
    except NoBrowser as error:
        print(f"The test of the chat page will be skipped: {error}")


if __name__ == "__main__":
    main()
