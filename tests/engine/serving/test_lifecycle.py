"""What does not go as it should: clients that leave, too many of them, a server that stops, a generator that fails."""

from __future__ import annotations

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.engine.serving.live import NAME, Alone, Live, served, wait_for
from tests.engine.serving.wire import CHAT, Wire, asked, head
from tests.ranks import PATIENCE

QUESTION = "头晕怎么办？"
ASKED = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
LONG = 180


def answer(live: Live, max_tokens: int) -> str:
    return live.client().chat.completions.create(max_tokens=max_tokens, **ASKED).choices[0].message.content


def accepted(live: Live) -> int:
    return sum(live.service.load)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(directory: Path, stream: bool) -> None:
    with served(directory, max_rows=1, max_queue=0) as live:
        live.gate.clear()
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=PATIENCE)
        body = json.dumps({**ASKED, "max_tokens": LONG, "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        wait_for(lambda: accepted(live) == 1 and live.is_at_gate.is_set())  # it takes in nothing until the next step
        with pytest.raises(openai.RateLimitError):
            answer(live, 3)
        connection.sock.close()
        wait_for(lambda: len(live.service._cancelled) == 1)
        live.gate.set()
        wait_for(lambda: accepted(live) == 0)
        assert live.generator.is_idle
        assert answer(live, 3) != ""
        text = live.service.metrics.text(0, 0)
        assert "chimed_answers_cancelled_total 1\n" in text
        written = int(text.partition("\nchimed_generated_tokens_total ")[2].partition("\n")[0])
        assert written < LONG  # of both


def test_a_full_queue_says_when_to_come_again_and_loses_nobody(directory: Path, alone: Alone) -> None:
    with served(directory, max_rows=2, max_queue=1) as live, ThreadPoolExecutor(3) as threads:
        live.gate.clear()
        waiting = [threads.submit(answer, live, 5 + number) for number in range(3)]
        wait_for(lambda: accepted(live) == 3)
        status, headers, told = live.post("/v1/chat/completions", ASKED)
        assert status == 429 and headers["Retry-After"] == "1"
        assert told["error"]["type"] == "rate_limit_error" and "Try again." in told["error"]["message"]
        live.gate.set()
        assert [one.result() for one in waiting] == [alone.chat(QUESTION, 5 + number) for number in range(3)]
        status, _, told = live.post("/v1/chat/completions", {**ASKED, "n": 4})
        assert status == 400 and "at most 3" in told["error"]["message"]


def test_a_server_that_stops_finishes_what_runs(directory: Path, alone: Alone) -> None:
    with served(directory) as live, ThreadPoolExecutor(1) as threads:
        live.gate.clear()
        running = threads.submit(answer, live, 30)
        wait_for(lambda: accepted(live) == 1)
        live.server.should_exit = True
        wait_for(lambda: not live.server.servers[0].is_serving())
        live.gate.set()
        assert running.result() == alone.chat(QUESTION, 30)
        live.thread.join(PATIENCE)
        assert not live.thread.is_alive() and not live.service.is_open


def test_clients_of_a_generator_that_fails_are_told_so(directory: Path) -> None:
    with served(directory) as live:
        told = threading.Event()
        live.service._on_failure = told.set

        def fail() -> None:
            raise RuntimeError("out of memory")

        live.generator.step = fail  # type: ignore[assignment, method-assign]
        with pytest.raises(openai.InternalServerError, match="The server failed"):
            answer(live, 3)
        assert told.wait(PATIENCE) and str(live.service.failure) == "out of memory"
        assert live.send("GET", "/health")[0] == 503
        assert live.post("/v1/chat/completions", ASKED)[0] == 503


def test_a_stream_that_fails_is_told_so_and_ends_as_others_do(directory: Path) -> None:
    """Were it broken off, a browser would drop what it has not read of it yet."""
    with served(directory) as live:

        def fail() -> None:
            raise RuntimeError("out of memory")

        live.generator.step = fail  # type: ignore[assignment, method-assign]
        with Wire(live) as wire:
            body = asked(stream=True)
            lines = "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"
            wire.send(head(CHAT, *lines) + body)
            answer = wire.rest()
        assert b"The server failed." in answer and answer.endswith(b"\r\n0\r\n\r\n")


def test_a_token_is_asked_for_everywhere_but_at_the_door(directory: Path) -> None:
    with served(directory, token="secret") as live:
        assert live.send("GET", "/health")[0] == 200
        for path in "/v1/models", "/metrics", "/openapi.json":
            assert live.send("GET", path)[0] == 401
        with pytest.raises(openai.AuthenticationError):
            live.client(token="secre").models.list()
        assert live.client(token="secret").models.list().data[0].id == NAME
