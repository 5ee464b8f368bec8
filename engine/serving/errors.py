"""What a client is told when a request cannot be served: a status and OpenAI's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not served.

    status: of HTTP.
    message: one sentence, what was found and what to do.
    code: a word for programs, such as "context_length_exceeded".
    headers: beside the body, such as Retry-After.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}, as OpenAI's clients read it."""
        message = self.message.encode(errors="backslashreplace").decode()  # half a surrogate pair is no UTF-8
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": self.code}}

    async def send(self, send: Any) -> None:
        """The whole answer, for a layer below the application."""
        content = json.dumps(self.body, ensure_ascii=False).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), **self.headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": content})
