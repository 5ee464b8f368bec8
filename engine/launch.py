"""The edge of every process: a command line in, an exit code out, and one sentence when something is wrong.

    0 done   1 unexpected   2 bad config, data or checkpoint   3 diverged   4 a gate failed
    130 / 143 stopped by SIGINT / SIGTERM or SIGUSR1, after saving   141 nobody reads stdout any more

torchrun itself returns 1 whatever its workers return, and ends with a report that names the first failing
rank's code. Under it the sentence goes into that report, so that it comes last and once.
"""

from __future__ import annotations

import errno
import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from engine.config import parse
from engine.files import explain
from model.errors import InputError

Config = TypeVar("Config")

EXIT_UNEXPECTED = 1
EXIT_INPUT = 2
EXIT_DIVERGED = 3
EXIT_GATE = 4
EXIT_UNREAD = 141


class DivergedError(RuntimeError):
    """Training produced too many unusable steps in a row; nothing but a change of recipe will help."""


class StoppedError(RuntimeError):
    """A signal asked the run to end; its state is saved. `code` is 130 or 143."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run(
    job: Callable[[Config], int | None],
    config_class: type[Config],
    aliases: dict[str, str] | None = None,
    default_config: Path | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line, call `job(config)`, and leave with the exit code its outcome has.

    Args:
        job: the work; returns an exit code, or None for 0.
        config_class, aliases, default_config: as in `engine.config.parse`.
        argv: words after the program's name; by default those of this process.
    """
    prog = Path(sys.argv[0]).name
    try:
        config = parse(config_class, sys.argv[1:] if argv is None else argv, prog, aliases, default_config)
        code = job(config) or 0
    except InputError as error:
        code = _fail(str(error), EXIT_INPUT)
    except DivergedError as error:
        code = _fail(str(error), EXIT_DIVERGED)
    except StoppedError as error:
        code = _fail(str(error), error.code)
    except KeyboardInterrupt:
        code = _fail("Interrupted. What was saved before is intact.", 130)
    except BrokenPipeError:
        code = EXIT_UNREAD if _is_stdout_unread() else _fail(traceback.format_exc().rstrip(), EXIT_UNEXPECTED)
    except OSError as error:
        is_refusal = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        message = f"Cannot write the run's files: {explain(error)}" if is_refusal else traceback.format_exc().rstrip()
        code = _fail(message, EXIT_INPUT if is_refusal else EXIT_UNEXPECTED)
    except Exception:
        code = _fail(traceback.format_exc().rstrip(), EXIT_UNEXPECTED)
    _leave(code)


def _fail(message: str, code: int) -> int:
    """Say why, once for all ranks."""
    if not is_main_process():
        # Rank 0 usually has the same to say, and its exit ends the others: speak only if it does not.
        time.sleep(3)
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        report = {"message": {"message": message, "errorCode": code, "extraInfo": details}}
        Path(error_file).write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    else:
        print(message, file=sys.stderr, flush=True)
    return code


def _leave(code: int) -> NoReturn:
    """Exit without waiting for threads or process groups whose peers may be gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or (EXIT_UNREAD if _is_stdout_unread() else EXIT_UNEXPECTED)
    sys.stderr.flush()
    if code == 0:
        sys.exit(0)
    os._exit(code)


def _is_stdout_unread() -> bool:
    """Whether who read stdout has left, such as head. What is still to be written then goes nowhere."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    is_unread = any(event & select.POLLERR for _, event in asked.poll(0))
    if is_unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_unread


def speak(message: Any) -> None:
    """A line of progress on stderr, from rank 0 only."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this is rank 0, by what torchrun says; true without it."""
    return int(os.environ.get("RANK", "0")) == 0
