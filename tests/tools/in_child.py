"""Run a tool as its own process would run it, at a twentieth of the price.

The process is forked from the server of `tests.ranks`, which has torch imported already. Everything else is the
tool's own: its argv, its working directory, its output, its exit code.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.generate import Event, Generator
from tests.ranks import PATIENCE, start_ranks

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# torchrun sets these; without it there are none.
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH_VARIABLES += ("TORCHELASTIC_USE_AGENT_STORE",)


@dataclass(frozen=True)
class Ended:
    """What a process left behind. `code` is negative for a signal that killed it."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        return (self.stderr.rstrip().splitlines() or [""])[-1]


class Running:
    """A tool at work in one or more processes."""

    def __init__(self, processes: list[Any], folder: Path) -> None:
        self.processes = processes
        self._folder = folder

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def stderr(self, rank: int = 0) -> str:
        """What has been said so far."""
        path = self._folder / f"stderr-{rank}"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait(self, timeout: float = PATIENCE) -> list[Ended]:
        """All ranks' ends; those that do not come in time are killed."""
        for process in self.processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
        return [
            Ended(process.exitcode, (self._folder / f"stdout-{rank}").read_text(encoding="utf-8"), self.stderr(rank))
            for rank, process in enumerate(self.processes)
        ]


def _tool_main(tool: str, arguments: list[str], cwd: str, folder: str, before: Callable[[], None] | None) -> None:
    rank, world = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    if world == 1:
        for name in LAUNCH_VARIABLES:
            del os.environ[name]
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(cwd)
    sys.argv = [str(TOOLS / f"{tool}.py"), *arguments]
    if before is not None:
        before()
    runpy.run_path(sys.argv[0], run_name="__main__")


def start_tool(
    tool: str, *arguments: object, cwd: Path, world: int = 1, before: Callable[[], None] | None = None
) -> Running:
    """Start `python tools/<tool>.py <arguments>`, or `world` processes of it as torchrun would.

    Args:
        cwd: the working directory; what the processes say goes to a folder in it.
        before: called in each process before the tool is; importable (module level).
    """
    folder = cwd / f".said-{sum(1 for _ in cwd.glob('.said-*'))}"
    folder.mkdir()
    words = [str(argument) for argument in arguments]
    return Running(start_ranks(_tool_main, world, tool, words, str(cwd), str(folder), before), folder)


def run_tool(
    tool: str, *arguments: object, cwd: Path, world: int = 1, before: Callable[[], None] | None = None
) -> list[Ended]:
    """Start a tool and wait for it."""
    return start_tool(tool, *arguments, cwd=cwd, world=world, before=before).wait()


def hold_generation(path: str, size: int, until: str) -> None:
    """For `before`: from when a file has so many bytes, the generator makes no step until there is another file.

    What a test does meanwhile falls between these two, however slow the test is.
    """
    step, watched, awaited = Generator.step, Path(path), Path(until)

    def held(self: Generator) -> list[Event]:
        while watched.exists() and watched.stat().st_size >= size and not awaited.exists():
            time.sleep(0.01)
        return step(self)

    Generator.step = held  # type: ignore[method-assign]
