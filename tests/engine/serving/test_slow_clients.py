"""Clients that send or read so slowly that a server without bounds would wait for ever: they hold up nobody."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.serving.limits import Limits
from tests.engine.serving.live import NAME, Alone, Live, served, wait_for
from tests.engine.serving.wire import CHAT, QUESTION, TEXT, Wire, asked, head, post

SECONDS = 1.5
"""What the server grants. The clients that behave beside the others must stay below it on a loaded machine too."""
BY_DEFAULT = Limits().client_seconds
pytestmark = pytest.mark.usefixtures("nothing_fails")


@pytest.fixture(scope="module")
def impatient(directory: Path) -> Iterator[Live]:
    with served(directory, limits=Limits(max_tokens=200, client_seconds=SECONDS)) as live:
        # Connections inherit it: what is not read soon waits in the server, not in the kernel.
        live.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield live


def is_answered(live: Live, alone: Alone) -> bool:
    with Wire(live) as other:
        other.send(post(asked()))
        status, answer = other.answer()
    return status == 200 and answer["choices"][0]["message"]["content"] == alone.chat(QUESTION, 5)


@pytest.mark.parametrize("sent", ["nothing", "half a head", "a head by drops", "the next head by drops"])
def test_a_head_that_does_not_come_ends_the_connection(impatient: Live, alone: Alone, sent: str) -> None:
    began = time.monotonic()
    with Wire(impatient) as wire:
        if sent == "half a head":
            wire.send(head()[:-2])
        elif sent == "the next head by drops":
            began = time.monotonic()
            wire.send(post(asked()))
            assert wire.answer()[0] == 200
        if "drops" in sent:
            wire.drip(head(CHAT, *(f"X-{number}: y" for number in range(40))))
        else:
            assert is_answered(impatient, alone)
        assert wire.rest() == b""
        assert SECONDS <= time.monotonic() - began < BY_DEFAULT


def test_a_body_by_drops_is_told_so(impatient: Live, alone: Alone) -> None:
    with Wire(impatient) as wire:
        wire.send(head(CHAT, "Content-Type: application/json", "Content-Length: 10000"))
        wire.drip(b" " * 200)
        assert wire.rest().startswith(b"HTTP/1.1 408 ")
    assert is_answered(impatient, alone)


@pytest.mark.parametrize("how", ["refused for its length", "refused for its host"])
def test_a_body_by_drops_behind_its_answer_ends_the_connection(impatient: Live, how: str) -> None:
    host, length, status = ("localhost", 2 << 20, 413) if how == "refused for its length" else ("x", 10000, 421)
    with Wire(impatient) as wire:
        began = time.monotonic()
        wire.send(head(CHAT, f"Content-Length: {length}", host=host))
        assert wire.answer()[0] == status
        wire.drip(b" " * 200)
        assert wire.rest() == b"" and time.monotonic() - began < BY_DEFAULT


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_takes_nothing_is_given_up(impatient: Live, alone: Alone, stream: bool) -> None:
    with Wire(impatient, buffer=4096) as wire:
        began = time.monotonic()
        wire.send(post(asked(max_tokens=100, n=8, stream=True)) if stream else post(scored(), TEXT))
        assert is_answered(impatient, alone)
        wait_for(lambda: not impatient.server.server_state.connections)
        assert time.monotonic() - began > SECONDS
        wait_for(lambda: impatient.service.load == (0, 0))
        assert b"[DONE]" not in (cut := wire.rest()) and not cut.endswith(b"}")


def test_a_client_that_takes_little_at_a_time_gets_all(impatient: Live) -> None:
    with Wire(impatient, buffer=4096) as wire:
        wire.send(post(scored(), TEXT))
        began, parts = time.monotonic(), []
        while not (parts and parts[-1].endswith(b"}}")):
            parts.append(wire.socket.recv(8192))
            assert parts[-1], "cut off"
            time.sleep(0.05)
        assert time.monotonic() - began > 2 * SECONDS
        answer = json.loads(b"".join(parts).partition(b"\r\n\r\n")[2])
        assert len(answer["choices"]) == 10


def scored() -> bytes:
    """For an answer of some 500 KB that is there at once."""
    prompts = [[5 + number] * 250 for number in range(10)]
    return json.dumps({"model": NAME, "prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 5}).encode()
