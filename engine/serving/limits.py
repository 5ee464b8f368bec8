"""How much a client may ask for, and the layer that reads bodies no larger and no slower than that."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from engine.serving.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """
    max_tokens: of one answer, also where none is asked for in a conversation.
    max_body: bytes of a request.
    client_seconds: in which a request's head must have come, its body after it, and in which a client must take
        something of what waits for it.
    """

    max_tokens: int = 2048
    max_body: int = 1 << 20
    client_seconds: float = 30.0


class BoundedBodies:
    """ASGI layer: the application gets whole bodies; 413 for one that is too large, 408 for one that is too slow."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._limits.client_seconds)
        except asyncio.TimeoutError:
            seconds = f"{self._limits.client_seconds:g} seconds"
            closing = {"connection": "close"}
            await ApiError(408, f"The request did not come whole within {seconds}. Send it again.", None, closing).send(
                send
            )
            return
        except ApiError as error:
            await error.send(send)
            return
        if body is None:  # the client has left
            return
        is_given = False

        async def receive_whole() -> Any:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_whole, send)

    async def _read(self, scope: Any, receive: Any) -> bytes | None:
        most = self._limits.max_body
        # The connection stays: closed on a client that still sends, it would lose the answer.
        too_large = ApiError(413, f"The request is larger than {most} bytes. Shorten it.", "request_too_large")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > most:
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)
