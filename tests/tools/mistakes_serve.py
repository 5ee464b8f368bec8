"""What users get wrong in serving models: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes.py`, where `tuned` is what fine-tuning has left.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Any

from tests.tools.mistakes import Mistake

_held = socket.socket()


def serve(*words: object, **how: Any) -> Mistake:
    return Mistake("serve", ("--model", "tuned", *words), **how)


def hide_fastapi() -> None:
    sys.modules["fastapi"] = None  # type: ignore[assignment]


def take_the_port() -> None:
    with contextlib.suppress(OSError):  # somebody else's then, which does as well
        _held.bind(("127.0.0.1", 8000))
        _held.listen()


MISTAKES_SERVE = {
    "serving without FastAPI": serve(before=hide_fastapi),
    "serving to others without a token": serve("--host", "0.0.0.0"),
    "a token that no header holds": serve("--token", "密码"),
    "a port that there is not": serve("--port", 70000),
    "a port that another server has": serve(before=take_the_port),
    "an address that is another machine's": serve("--host", "192.0.2.1", "--token", "secret"),
    "a name with a scheme, for a server": serve("--hosts", "[https://ward.example]"),
    "a server that lets nothing be written": serve("--limits.tokens", 0),
    "serving a reward model": Mistake("serve", ("--model", "judge", "--port", 0)),
}
