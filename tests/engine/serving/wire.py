"""A client that decides over every byte and every pause."""

from __future__ import annotations

import json
import socket
import time
from http.client import HTTPResponse
from typing import Any

from tests.engine.serving.live import NAME, Live
from tests.ranks import PATIENCE

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = "头晕怎么办？"


def asked(question: str = QUESTION, max_tokens: int = 5, **options: Any) -> bytes:
    """A greedy conversation in JSON."""
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], "temperature": 0}
    return json.dumps({**body, "max_tokens": max_tokens, **options}).encode()


def head(path: str = CHAT, *lines: str, method: str = "POST", host: str = "localhost") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


def post(body: bytes, path: str = CHAT, kind: str = "application/json") -> bytes:
    """A whole request."""
    return head(path, f"Content-Type: {kind}", f"Content-Length: {len(body)}") + body


class Wire:
    """A connection to a server. buffer: bytes that the kernel may hold for this side, as it rounds them."""

    def __init__(self, live: Live, buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE)
        if buffer is not None:
            # Segments larger than the buffer would come one by one, as timers allow.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect(("127.0.0.1", live.port))

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def drip(self, data: bytes, pause: float = 0.02) -> None:
        """A byte at a time, until all are sent or nobody listens."""
        for byte in data:
            try:
                self.socket.sendall(bytes([byte]))
            except OSError:
                return
            time.sleep(pause)

    def answer(self) -> tuple[int, Any]:
        """Status and JSON of the next one."""
        # Unbuffered, for what belongs to the next answer must stay.
        response = HTTPResponse(self.socket)
        response.fp.close()
        response.fp = self.socket.makefile("rb", 0)
        response.begin()
        return response.status, json.loads(response.read())

    def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        parts = []
        try:
            while part := self.socket.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)
