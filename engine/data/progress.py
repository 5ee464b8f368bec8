"""How far a preparation is, on stderr."""

from __future__ import annotations

from engine.data.prepare import Progress
from engine.live_line import LiveLine, duration


class ProgressLine:
    """Prints what `prepare` reports."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._line = LiveLine()

    def __call__(self, progress: Progress) -> None:
        self._line.show(self._text(progress), is_last=progress.done >= progress.total)

    def _text(self, progress: Progress) -> str:
        share = progress.done / max(1, progress.total)
        left = progress.seconds_left
        return (
            f"{self._what} {share:4.0%}  {progress.done / 1e6:,.0f} of {progress.total / 1e6:,.0f} MB  "
            f"{progress.documents:,} documents  {progress.tokens:,} tokens  {progress.rate / 1e6:.1f} MB/s"
            + ("" if left is None else f"  {duration(left)} left")
        )
