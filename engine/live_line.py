"""How far a long piece of work is, on stderr: one refreshing line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 15.0


class LiveLine:
    """A line that is shown again and again."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown = float("-inf")

    def show(self, text: str, is_last: bool = False) -> None:
        """The text as it is now, if it is time for it; the last one always."""
        if self._is_terminal:
            print(f"\r\033[K{text}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        elif is_last or time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """3725 is "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
