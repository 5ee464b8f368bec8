"""Who may ask: everybody on this machine, or from elsewhere whoever knows the token."""

from __future__ import annotations

import hmac
import ipaddress
from typing import Any

from engine.serving.errors import ApiError

# The page asks for the token itself; whether the server is up is no secret.
_OPEN = ("/", "/health")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class TokenRequired:
    """ASGI layer: 401 without `Authorization: Bearer TOKEN`, but for the page and /health."""

    def __init__(self, app: Any, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        is_open = scope["type"] != "http" or scope["path"] in _OPEN
        if is_open or hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        message = "The token is missing or another. Send the server's as Authorization: Bearer TOKEN."
        await ApiError(401, message, "invalid_api_key", {"www-authenticate": "Bearer"}).send(send)
