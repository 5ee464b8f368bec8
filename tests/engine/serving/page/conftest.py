"""One browser for a file of tests, and the page in it. Not for a package: asyncio.run fails beside Playwright."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.browser import NoBrowser, open_browser
from tests.engine.serving.live import Live
from tests.engine.serving.page.chat import Chat, Dictation, dictated

Open = Callable[..., Chat]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        with open_browser() as opened:
            yield opened
    except NoBrowser as error:
        pytest.skip(str(error))


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens pages, and sees in the end that they were quiet and kept to their server."""
    opened: list[Chat] = []

    def open_one(live: Live, **how: Any) -> Chat:
        opened.append(Chat(browser, live, **how))
        return opened[-1]

    yield open_one
    for chat in opened:
        chat.close()


@pytest.fixture
def chat(open_page: Open, live: Live) -> Chat:
    return open_page(live)


@pytest.fixture
def dictation(live: Live) -> Iterator[Dictation]:
    with dictated(live) as given:
        yield given
