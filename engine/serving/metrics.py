"""What the server counts, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the histograms' buckets."""
_COUNTED_PATHS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/chat/completions", "/v1/completions")


class Histogram:
    """Durations by bucket."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[sum(seconds > bound for bound in SECONDS)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        total, lines = 0, [f"# TYPE {name} histogram"]
        for bound, count in zip((*SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum}", f"{name}_count {total}"]


class Metrics:
    """Counters and histograms of a server, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._counts: Counter[str] = Counter(prompt_tokens=0, generated_tokens=0, answers=0, answers_cancelled=0)
        self._first_token, self._request = Histogram(), Histogram()

    def count(self, name: str, number: int = 1) -> None:
        """Add to prompt_tokens, generated_tokens, answers or answers_cancelled."""
        assert name in self._counts
        with self._lock:
            self._counts[name] += number

    def first_token(self, seconds: float) -> None:
        """How long an accepted request waited for its first token."""
        with self._lock:
            self._first_token.add(seconds)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request that is over; paths that are not served count as one."""
        with self._lock:
            self._requests[path if path in _COUNTED_PATHS else "other", status] += 1
            self._request.add(seconds)

    def text(self, running: int, waiting: int) -> str:
        """The page. running, waiting: answers that are being written, and those accepted that are not yet."""
        with self._lock:
            lines = ["# TYPE chimed_requests_total counter"]
            for (path, status), count in sorted(self._requests.items()):
                lines.append(f'chimed_requests_total{{path="{path}",status="{status}"}} {count}')
            for name, count in self._counts.items():
                lines += [f"# TYPE chimed_{name}_total counter", f"chimed_{name}_total {count}"]
            for name, value in ("running", running), ("waiting", waiting):
                lines += [f"# TYPE chimed_answers_{name} gauge", f"chimed_answers_{name} {value}"]
            lines += self._first_token.lines("chimed_first_token_seconds")
            lines += self._request.lines("chimed_request_seconds")
        return "\n".join(lines) + "\n"


class Measured:
    """ASGI layer: counts every request by path and status, and how long it took."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 499, time.monotonic()  # of a client that left before it was answered

        async def send_on(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            self._metrics.request(scope["path"], status, time.monotonic() - began)
