"""The chat page in a browser, as somebody who uses it sees it; and a server whose words a test puts into its mouth."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect

from model.generate import Event
from model.generate import Request as GeneratorRequest
from tests.engine.serving.live import Live

# Milliseconds. Every wrong word waits so long, so it is shorter than what catches a process that hangs.
LIMIT = 60_000
expect.set_options(timeout=LIMIT)


class Dictation:
    """The generator's next answer will be these pieces, one a token, as far as `let` has allowed."""

    def __init__(self, live: Live) -> None:
        self._generator, self._changed = live.generator, threading.Condition()
        self._own = {name: getattr(live.generator, name) for name in ("add", "step", "cancel")}
        self._pieces: list[str] = []
        self._said = self._allowed = 0
        self._held: list[Event] = []  # a step may give several
        for name in self._own:
            setattr(live.generator, name, getattr(self, name))

    def say(self, pieces: Sequence[str], allowed: int | None = None) -> None:
        """allowed: how many of them are said before `let`; all, if it is None."""
        with self._changed:
            self._pieces, self._said = list(pieces), 0
            self._allowed = len(pieces) if allowed is None else allowed
            self._changed.notify()

    def let(self, pieces: int) -> None:
        """Go on with so many."""
        with self._changed:
            self._allowed += pieces
            self._changed.notify()

    def fail_with(self, error: Exception) -> None:
        """What comes of the next piece."""

        def fail() -> list[Event]:
            raise error

        self._own["step"], self._held = fail, []
        self.let(1)

    def end(self) -> None:
        for name, method in self._own.items():
            setattr(self._generator, name, method)

    def add(self, request: GeneratorRequest) -> int:
        return self._own["add"](replace(request, options=replace(request.options, temperature=0, stop_ids=())))

    def cancel(self, request: int, sample: int | None = None) -> None:
        self._held = [event for event in self._held if event.request != request]
        self._own["cancel"](request, sample)

    def step(self) -> list[Event]:
        with self._changed:
            if not self._changed.wait_for(lambda: self._said < self._allowed, 0.05):
                return []  # between two steps the service hears who has left
        if not self._held:
            self._held = self._own["step"]()
        return [self._put(self._held.pop(0))] if self._held else []

    def _put(self, event: Event) -> Event:
        with self._changed:
            piece = self._pieces[self._said]
            self._said += 1
            is_last = self._said == len(self._pieces)
        if is_last:
            self.cancel(event.request)
        return replace(event, text=piece, end_reason="stop" if is_last else None)


@contextmanager
def dictated(live: Live) -> Iterator[Dictation]:
    dictation = Dictation(live)
    try:
        yield dictation
    finally:
        dictation.end()


class Chat:
    """The page of a server, opened by somebody with that language. What is not found is waited for."""

    def __init__(self, browser: Browser, live: Live, language: str = "zh-CN", **how: Any) -> None:
        self.origin = f"http://127.0.0.1:{live.port}"
        self.context = browser.new_context(locale=language, **how)
        self.context.set_default_timeout(LIMIT)
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request))
        self.context.on("console", self._hear)
        self.context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        self.page: Page = self.context.new_page()
        self.page.goto(self.origin)

    def _hear(self, message: ConsoleMessage) -> None:
        # The browser itself notes every status of 400 and above, which the page then shows.
        is_status = message.text.startswith("Failed to load resource") and "/v1/" in message.location["url"]
        if message.type in ("error", "warning") and not is_status:
            self.complaints.append(message.text)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def question(self) -> Locator:
        return self.page.locator("#question")

    @property
    def answer(self) -> Locator:
        """The last one."""
        return self.page.locator(".answer").last

    @property
    def error(self) -> Locator:
        return self.page.locator("article .error").last

    @property
    def facts(self) -> Locator:
        """What is said of the last answer."""
        return self.page.locator(".facts").last

    def ask(self, text: str) -> None:
        self.question.fill(text)
        self.question.press("Enter")

    def set(self, **settings: object) -> None:
        """By the names that the server gives to them; system is the system prompt."""
        self.button("设置").click()
        for name, value in settings.items():
            self.page.locator(f"[name={name}]").fill(str(value))
        self.button("完成").click()

    @property
    def asked(self) -> list[dict[str, Any]]:
        """What the server was sent to answer."""
        return [request.post_data_json for request in self.requests if request.url.endswith("/chat/completions")]

    def close(self) -> None:
        """Nobody but the server was asked, and the browser had nothing to complain about."""
        self.page.evaluate("0")  # what is on its way has come
        self.context.close()
        assert self.complaints == []
        elsewhere = [request.url for request in self.requests if not request.url.startswith((self.origin, "data:"))]
        assert elsewhere == []
