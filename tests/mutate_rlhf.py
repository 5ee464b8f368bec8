"""Break the mathematics of alignment, one detail at a time, and see that a named test goes red for each.

    make mutate-rlhf                      all of tests/mutations_rlhf.yaml
    python tests/mutate_rlhf.py 12 k3     those with detail 12, or with k3 in their words

Each mutation is a textual patch of a copy of the tree in a temporary directory; the working tree is never touched. The
named tests must be green on an untouched copy first, and red because something they assert does not hold. Exit code 4
if any stays green with its detail broken, ends in another way, or if a patch no longer fits.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutations_rlhf.yaml"
NEEDED = (
    "kernels",
    "model",
    "engine",
    "rlhf",
    "evals",
    "tools",
    "samples",
    "configs",
    "docs",
    "tests",
    "pyproject.toml",
)
AT_ONCE = 2
# Imported before the processes are forked that a mutation each runs in. None of the project's own is among them.
PRELOADED = ("torch", "torch._dynamo", "torch.distributed.checkpoint", "numpy", "pytest", "hypothesis", "safetensors")
# How a test ends that has noticed something: an assertion, or an error that was expected and did not come.
NOTICED = re.compile(r"^E +(assert |AssertionError|Failed: DID NOT RAISE)", re.MULTILINE)

Outcome = Literal["red", "GREEN", "ERROR"]


@dataclass(frozen=True)
class Mutation:
    """One row of the table.

    detail: its number in docs/rlhf-details.md; breaks: what is then wrong, in words.
    path, find, put: the text that is replaced, which occurs once; test: what must go red.
    """

    detail: str
    breaks: str
    path: str
    find: str
    put: str
    test: str

    def misfit(self, folder: Path = ROOT) -> str | None:
        """Why the patch cannot be applied, if it cannot."""
        path = folder / self.path
        count = path.read_text(encoding="utf-8").count(self.find) if path.exists() else 0
        return None if count == 1 else f"what it replaces occurs {count} times in {self.path}"

    def apply(self, folder: Path) -> None:
        path = folder / self.path
        path.write_text(path.read_text(encoding="utf-8").replace(self.find, self.put), encoding="utf-8")


def read_table() -> list[Mutation]:
    rows: list[dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return [
        Mutation(str(row["detail"]), row["breaks"], row["in"], row["find"], row["put"], row["test"]) for row in rows
    ]


def _pytest(folder: Path, tests: Sequence[str], mutation: Mutation | None) -> None:
    """In a process of its own: run tests of a copy of the tree, after breaking it."""
    sys.dont_write_bytecode = mutation is not None  # what is broken leaves nothing behind
    if mutation is not None:
        mutation.apply(folder)
    output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    # Ranks that a test starts take their modules from here too.
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(place for place in sys.path if Path(place).resolve() not in (ROOT, ROOT / "tests"))]
    import pytest

    code = pytest.main(["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(folder), *tests])
    sys.stdout.flush()
    os._exit(int(code))


def outcomes(
    whole: Path, jobs: Sequence[tuple[Sequence[str], Mutation | None]], at_once: int
) -> Iterator[tuple[int, Outcome, str]]:
    """Run each job on a copy of a tree; its number, what came of it and what pytest said, as they end."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(enumerate(jobs)), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number, (tests, mutation) = waiting.pop(0)
            folder = whole if mutation is None else Path(shutil.copytree(whole, f"{whole}-{number}"))
            process = context.Process(target=_pytest, args=(folder, tests, mutation))
            process.start()
            running[process.sentinel] = process, number, folder
        for sentinel in wait(list(running)):
            process, number, folder = running.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            said = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            has_noticed = process.exitcode == 1 and NOTICED.search(said)
            yield number, "red" if has_noticed else "GREEN" if process.exitcode == 0 else "ERROR", said
            if folder != whole:
                shutil.rmtree(folder)


def main(words: Sequence[str]) -> int:
    chosen = [
        row
        for row in read_table()
        if not words or any(word == row.detail if word.isdigit() else word in row.breaks for word in words)
    ]
    wrong = [f"{row.breaks}: {reason}" for row in chosen if (reason := row.misfit())]
    table = [row for row in chosen if not row.misfit()]
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOADED:
        __import__(name)
    begin = time.monotonic()

    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "tree"
        for name in NEEDED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, whole / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, whole / name)
        for _, outcome, said in outcomes(whole, [(sorted({row.test for row in table}), None)], 1):
            if outcome != "GREEN":
                print(f"{said}\nNothing was broken yet, and the named tests are not green.", file=sys.stderr)
                return 4
        print(f"detail         {'broken so that':64}  test")
        for number, outcome, said in outcomes(whole, [([row.test], row) for row in table], AT_ONCE):
            row = table[number]
            print(f"{row.detail:>6}  {outcome:5}  {row.breaks:64}  {row.test.partition('::')[2]}", flush=True)
            if outcome == "GREEN":
                wrong.append(f"{row.breaks}: {row.test} stays green")
            elif outcome == "ERROR":
                wrong.append(f"{row.breaks}: {row.test} ends without an assertion that fails:\n{said}")

    for sentence in wrong:
        print(sentence, file=sys.stderr)
    print(f"{len(table)} mutations in {time.monotonic() - begin:.0f} s; {len(wrong)} wrong.")
    return 4 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
