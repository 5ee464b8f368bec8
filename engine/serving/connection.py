"""Connections that no client holds up: uvicorn's, which wait for ever for a head and for a reader, with time limits.

What a connection waits for, and for how long:

    a head          from the first byte, or from the opening, `client_seconds`; between requests uvicorn's own 5 s
    a body          `engine.serving.limits` while the application reads it; what is left of it behind the answer,
                    which is passed over, `client_seconds`
    a reader        `client_seconds` in which it takes nothing of what waits for it

The protocol is uvicorn's on h11, whatever else is installed: the other one names no state to bound.
"""

from __future__ import annotations

import asyncio
import json
import socket
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.serving.errors import ApiError
from engine.serving.limits import Limits


def server_settings(app: Any, limits: Limits, shutdown_seconds: float | None = None) -> uvicorn.Config:
    """How uvicorn runs the application.

    shutdown_seconds: what is left to running answers when the server is told to stop; None: as long as they take.
    """
    return uvicorn.Config(
        app,
        http=partial(BoundedConnection, limits.client_seconds),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=shutdown_seconds,  # type: ignore[arg-type]  # seconds may be parts
    )


class BoundedConnection(H11Protocol):
    """seconds: for a head, for a body that nobody reads any more, and for taking something of an answer."""

    def __init__(self, seconds: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seconds = seconds
        self._owed: str | None = None
        self._overdue: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # An answer is written in parts; the kernel would hold back the second until the first is acknowledged, 40 ms.
        # asyncio turns that off only for sockets that were made with the protocol's number.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Whatever the kernel does not take at once counts as waiting for the reader.
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def _expect(self) -> None:
        """Begin to wait for what the client owes, or go on if that is what was waited for."""
        owed = None
        if self.conn.their_state is h11.IDLE:
            owed = "head"
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            owed = "rest of a body"
        if owed == self._owed:
            return
        self._owed = owed
        if self._overdue is not None:
            self._overdue.cancel()
        self._overdue = None if owed is None else self.loop.call_later(self._seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _wait_for_reader(self, before: int) -> None:
        """Whether less is left than before: then there is somebody who reads."""
        left = self.transport.get_write_buffer_size()
        if left < before:
            self._stalled = self.loop.call_later(self._seconds, self._wait_for_reader, left)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._overdue, self._stalled:
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so in the shape of all errors, unless an answer has begun or was given."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        content = json.dumps(ApiError(400, "The request is not HTTP, or its head is too long. Correct it.").body)
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        for event in h11.Response(status_code=400, headers=headers), h11.Data(content.encode()), h11.EndOfMessage():
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
