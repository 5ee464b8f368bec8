"""How far a preparation is, on stderr: one refreshing line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from engine.data.prepare import Progress

_SECONDS_BETWEEN_LINES = 15.0


class ProgressLine:
    """Prints what `prepare` reports."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._is_terminal = sys.stderr.isatty()
        self._printed = -_SECONDS_BETWEEN_LINES

    def __call__(self, progress: Progress) -> None:
        is_last = progress.done >= progress.total
        if self._is_terminal:
            print(f"\r\033[K{self._text(progress)}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        elif is_last or time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            print(self._text(progress), file=sys.stderr, flush=True)

    def _text(self, progress: Progress) -> str:
        share = progress.done / max(1, progress.total)
        left = progress.seconds_left
        return (
            f"{self._what} {share:4.0%}  {progress.done / 1e6:,.0f} of {progress.total / 1e6:,.0f} MB  "
            f"{progress.documents:,} documents  {progress.tokens:,} tokens  {progress.rate / 1e6:.1f} MB/s"
            + ("" if left is None else f"  {_duration(left)} left")
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
