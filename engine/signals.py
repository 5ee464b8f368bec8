"""Signals ask the run to stop; the loop stops it after saving."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

# torchrun and the terminal may both deliver the first Ctrl-C; one this much later means it.
_IMPATIENCE_SECONDS = 3.0


class StopSignals:
    """Context in which SIGTERM, SIGINT and SIGUSR1 only raise a flag.

    A second SIGINT some seconds later interrupts at once, without saving.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self._received: int | None = None
        self._when = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received and time.monotonic() - self._when > _IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
        if self._received is None:
            self._received, self._when = number, time.monotonic()
            if int(os.environ.get("RANK", "0")) == 0:
                # Not print: what the signal broke into may be a print itself.
                os.write(2, f"\n{signal.Signals(number).name}: saving after this step, then stopping.\n".encode())

    @property
    def wants_stop(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT; 143 after the others, and when another rank was asked."""
        return 130 if self._received == signal.SIGINT else 143
