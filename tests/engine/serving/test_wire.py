"""What comes over a connection beside one whole request: large bodies, several requests, none, and half ones."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.serving.limits import Limits
from tests.engine.serving.live import Alone, Live, served, wait_for
from tests.engine.serving.wire import CHAT, QUESTION, Wire, asked, head, post

JSON = "Content-Type: application/json"
pytestmark = pytest.mark.usefixtures("nothing_fails")


@pytest.fixture(scope="module")
def narrow(directory: Path) -> Iterator[Live]:
    with served(directory, limits=Limits(max_tokens=200, max_body=1000)) as live:
        yield live


def content(answer: tuple[int, Any]) -> str:
    assert answer[0] == 200, answer
    return answer[1]["choices"][0]["message"]["content"]


def test_the_parts_of_an_answer_wait_for_no_acknowledgement(narrow: Live) -> None:
    with Wire(narrow) as wire:
        wire.send(post(asked()))
        assert wire.answer()[0] == 200
        wait_for(lambda: len(narrow.server.server_state.connections) == 1)  # those of other tests are gone
        (connection,) = narrow.server.server_state.connections
        sent_by = connection.transport.get_extra_info("socket")
        assert sent_by.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_huge_body_is_refused_and_the_connection_goes_on(narrow: Live, alone: Alone, is_declared: bool) -> None:
    size, part = 16 << 20, b" " * 65536
    with Wire(narrow) as wire:
        if is_declared:
            wire.send(head(CHAT, JSON, f"Content-Length: {size}"))
            for _ in range(size // len(part)):
                wire.send(part)
        else:
            wire.send(head(CHAT, JSON, "Transfer-Encoding: chunked"))
            for _ in range(size // len(part)):
                wire.send(b"10000\r\n" + part + b"\r\n")
            wire.send(b"0\r\n\r\n")
        status, told = wire.answer()
        assert status == 413 and told["error"]["code"] == "request_too_large"
        wire.send(post(asked()))
        assert content(wire.answer()) == alone.chat(QUESTION, 5)


def test_a_client_that_waits_to_be_told_to_go_on_is_told_so_or_refused(narrow: Live, alone: Alone) -> None:
    waits, body = ("Expect: 100-continue", JSON), asked()
    with Wire(narrow) as wire:
        wire.send(head(CHAT, *waits, f"Content-Length: {len(body)}"))
        assert wire.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(body)
        assert content(wire.answer()) == alone.chat(QUESTION, 5)
        wire.send(head(CHAT, *waits, "Content-Length: 1001"))
        assert wire.answer()[0] == 413


def test_a_body_in_chunks_without_a_length_is_read(narrow: Live, alone: Alone) -> None:
    with Wire(narrow) as wire:
        wire.send(head(CHAT, JSON, "Transfer-Encoding: chunked"))
        for byte in asked():
            wire.send(b"1\r\n" + bytes([byte]) + b"\r\n")
        wire.send(b"0\r\n\r\n")
        assert content(wire.answer()) == alone.chat(QUESTION, 5)


def test_requests_sent_at_once_are_answered_in_their_order(live: Live, alone: Alone) -> None:
    questions = ["头晕", "咳嗽三天", "腹痛"]
    with Wire(live) as wire:
        wire.send(post(asked(questions[0])) + post(b"{") + post(asked(questions[1])) + post(asked(questions[2])))
        assert content(wire.answer()) == alone.chat(questions[0], 5)
        assert wire.answer()[0] == 400
        assert [content(wire.answer()) for _ in range(2)] == [alone.chat(question, 5) for question in questions[1:]]


NO_HTTP = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "a head without end": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000,
    "two hosts": head(CHAT, "Host: elsewhere"),
    "two lengths": head(CHAT, "Content-Length: 5", "Content-Length: 6"),
    "a negative length": head(CHAT, "Content-Length: -1"),
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "a chunk that is none": head(CHAT, JSON, "Transfer-Encoding: chunked") + b"xyz\r\n",
    "an encoding that is unknown": head(CHAT, "Transfer-Encoding: gzip"),
}


@pytest.mark.parametrize("what", NO_HTTP)
def test_what_is_no_http_is_told_so_in_json(live: Live, what: str) -> None:
    with Wire(live) as wire:
        wire.send(NO_HTTP[what])
        status, told = wire.answer()
        assert status == 400 and told["error"]["type"] == "invalid_request_error"
        assert wire.rest() == b""


@pytest.mark.parametrize("behind", [b"", b"xyz\r\n", b"\x00" * 5000])
def test_what_follows_a_refusal_and_is_no_http_ends_the_connection(narrow: Live, behind: bytes) -> None:
    with Wire(narrow) as wire:
        wire.send(head(CHAT, "Transfer-Encoding: chunked", host="elsewhere"))
        assert wire.answer()[0] == 421
        wire.send(b"5\r\n     \r\n" + behind + b"\x00")
        wire.send(b"\r\n")
        assert wire.rest() == b""


def test_a_length_beside_chunks_smuggles_nothing(live: Live, alone: Alone) -> None:
    """Who believes the length takes what follows the chunks for the next request's head, or the other way round."""
    smuggled = head("/nowhere", method="GET")
    body = asked()
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    with Wire(live) as wire:
        wire.send(head(CHAT, JSON, f"Content-Length: {len(chunk) + len(smuggled)}", "Transfer-Encoding: chunked"))
        wire.send(chunk + smuggled)
        status, told = wire.answer()
        assert status in (200, 400), told
        if status == 200:
            assert content((status, told)) == alone.chat(QUESTION, 5)
            assert wire.answer()[0] == 404  # chunks end where they say


def test_the_last_of_two_equal_keys_counts(live: Live) -> None:
    with Wire(live) as wire:
        wire.send(post(asked()[:-1] + b', "max_tokens": 2}'))
        assert wire.answer()[1]["usage"]["completion_tokens"] == 2


def test_clients_that_leave_anywhere_take_nobody_along(live: Live, alone: Alone) -> None:
    """Cut within the head, the body, the waiting, and the answer, while others are answered."""
    request, streamed = post(asked(max_tokens=30)), post(asked(max_tokens=30, stream=True))
    questions = [f"{QUESTION}{number}" for number in range(4)]
    expected = {question: alone.chat(question, 20) for question in questions}

    def ask(question: str) -> bool:
        with Wire(live) as wire:
            for _ in range(4):
                wire.send(post(asked(question, 20)))
                if content(wire.answer()) != expected[question]:
                    return False
        return True

    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(ask, question) for question in questions]
        for cut in range(1, len(request), 31):
            with Wire(live) as wire:
                wire.send(request[:cut])
        for sent, most in (streamed, 3000), (request + request, 600):
            for taken in range(0, most, most // 6):
                with Wire(live) as wire:
                    wire.send(sent)
                    while taken > 0:
                        taken -= len(wire.socket.recv(min(taken, 256)))
        assert all(other.result() for other in others)
    wait_for(lambda: live.service.load == (0, 0))
    assert live.generator.is_idle


KINDS = ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_from_elsewhere_cannot_ask(live: Live, kind: str) -> None:
    """Browsers send these kinds for any page unasked; for JSON they ask first, and are not let."""
    before = live.service.metrics.text(0, 0)
    for path, body in ((CHAT, asked()), ("/v1/completions", json.dumps({"model": "small", "prompt": "x"}).encode())):
        with Wire(live) as wire:
            lines = ["Origin: http://elsewhere.example", f"Content-Length: {len(body)}"]
            wire.send(head(path, *lines, *([f"Content-Type: {kind}"] if kind else [])) + body)
            assert wire.answer()[0] == 400
            wire.send(head(path, *lines[:1], "Access-Control-Request-Method: POST", method="OPTIONS"))
            refused = wire.socket.recv(65536)
            assert refused.startswith(b"HTTP/1.1 405 ") and b"access-control" not in refused.lower()
    after = live.service.metrics.text(0, 0)
    for line in "chimed_generated_tokens_total ", "chimed_prompt_tokens_total ":
        assert before.partition(line)[2].partition("\n")[0] == after.partition(line)[2].partition("\n")[0]


HOSTS = {"localhost": 200, "LOCALHOST:8000": 200, "127.0.0.1": 200, "127.0.0.1:1": 200, "[::1]:8000": 200, "[::1]": 200}
HOSTS |= {"elsewhere.example": 421, "elsewhere.example:8000": 421, "127.0.0.1.elsewhere.example": 421, "": 421}
HOSTS |= {"localhost:elsewhere.example": 421, "127.0.0.1:x": 421}
HOSTS |= {"localhost.elsewhere.example": 421, "elsewhere.example:localhost": 421, "ward.example": 421, "10.0.0.1": 421}


@pytest.mark.parametrize("host", HOSTS)
def test_a_name_that_is_not_this_machines_is_not_answered(live: Live, host: str) -> None:
    """A page whose name has come to resolve to 127.0.0.1 reads nothing."""
    for path in "/health", "/v1/models", "/metrics", "/openapi.json", "/nowhere":
        with Wire(live) as wire:
            wire.send(head(path, method="GET", host=host))
            answer = wire.socket.recv(65536)
            assert (b" 421 " in answer[:13]) == (HOSTS[host] == 421), answer
    with Wire(live) as wire:
        body = asked()
        wire.send(head(CHAT, JSON, f"Content-Length: {len(body)}", host=host) + body)
        status, told = wire.answer()
        assert status == HOSTS[host]
        assert status == 200 or told["error"]["code"] == "unknown_host"


def test_names_can_be_allowed_and_a_token_does_without(directory: Path) -> None:
    def status(live: Live, host: str) -> int:
        with Wire(live) as wire:
            wire.send(head("/v1/models", "Authorization: Bearer secret", method="GET", host=host))
            return wire.answer()[0]

    names = ("Ward.example:443", "ward.example", "localhost", "elsewhere.example")
    with served(directory, hosts=["ward.example"]) as live:
        assert [status(live, name) for name in names] == [200, 200, 200, 421]
    with served(directory, token="secret") as live:
        assert [status(live, name) for name in names] == [200, 200, 200, 200]
    with served(directory, token="secret", hosts=["ward.example"]) as live:
        assert [status(live, name) for name in names] == [200, 200, 200, 421]
