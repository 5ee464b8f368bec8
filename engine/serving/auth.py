"""Who may ask: everybody on this machine, or from elsewhere whoever knows the token."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
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


class KnownHosts:
    """ASGI layer: 421 for a request to a name that is neither this machine's own nor one of `names`.

    A page from elsewhere may have its name resolve to 127.0.0.1 once it is loaded; to the browser it is then the
    server's own page, and reads what others may not. Its requests still carry its name in Host.
    """

    def __init__(self, app: Any, names: Iterable[str]) -> None:
        self._app, self._names = app, frozenset(name.lower() for name in names)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value.decode("latin-1") for header, value in scope["headers"] if header == b"host"]
        if len(given) == 1 and ((name := host_name(given[0])) in self._names or is_loopback(name)):
            await self._app(scope, receive, send)
            return
        message = f"This server is not known as {', '.join(given) or 'nothing'!r}. Start it with --hosts NAME if it is."
        await ApiError(421, message, "unknown_host").send(send)


def host_name(authority: str) -> str:
    """The name in `name`, `name:8000`, `[::1]` or `[::1]:8000`."""
    name, colon, port = authority.rpartition(":")
    if not colon or not (port.isdigit() or port == "") or authority.endswith("]"):
        name = authority
    return name.removeprefix("[").removesuffix("]").lower()
