"""Worker processes that tokenise units, one each at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from engine.data.encoders import Encoder
from engine.data.records import SourceFile
from engine.data.units import Unit
from engine.data.worker import Setting, receive, send
from model.errors import InputError

Job: TypeAlias = tuple[Unit, dict[int, SourceFile]]

_ROOT = Path(__file__).resolve().parents[2]


def run_workers(
    count: int,
    jobs: Iterator[Job],
    encoder: Encoder,
    setting: Setting,
    report: Callable[[Unit, dict[str, Any]], None],
) -> None:
    """Have all jobs done by `count` processes.

    A job is taken from the iterator when a process is free for it, so no more of them exist than processes.

    Args:
        report: called with each unit's facts, never by two threads at once.
    Raises:
        InputError: a job was refused, or a process died.
        OSError: a process could not write.
    """
    one_at_a_time = threading.Lock()

    def drive(process: subprocess.Popen[bytes]) -> None:
        questions, answers = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
        try:
            send(questions, (setting, encoder))
            while True:
                with one_at_a_time:
                    job = next(jobs, None)
                if job is None:
                    return
                send(questions, job)
                # The records that travelled are the worker's now; dozens of units need not stay here as well.
                unit, job = Unit(job[0].index, size=job[0].size), None
                kind, answer = receive(answers)
                if kind == "refused":
                    raise InputError(answer)
                if kind == "system":
                    raise answer
                assert kind == "done", answer
                with one_at_a_time:
                    report(unit, answer)
        except (EOFError, BrokenPipeError):
            raise InputError(
                f"A tokenising process ended with code {process.wait()}, perhaps for lack of memory. Start again "
                "with fewer --workers; what is finished is kept."
            ) from None

    processes: list[subprocess.Popen[bytes]] = []
    threads = ThreadPoolExecutor(count)
    try:
        processes += [_start() for _ in range(count)]
        outcomes = [threads.submit(drive, process) for process in processes]
        for outcome in wait(outcomes, return_when=FIRST_EXCEPTION).done:
            outcome.result()
    finally:
        for process in processes:
            process.kill()
            process.wait()
        threads.shutdown()


def _start() -> subprocess.Popen[bytes]:
    # Processes share the cores: none of them starts threads.
    single = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "engine.data.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **single, "PYTHONPATH": path},
    )
