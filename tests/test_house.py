"""The plan of the house: which room may import which, and what is never imported at run time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"kernels": 0, "model": 1, "engine": 2, "rlhf": 3, "evals": 3, "tools": 4}
ORACLES = {"transformers", "trl", "peft", "accelerate", "deepspeed", "datasets"}
# These race against transformers and TRL, or compare with them when asked to; nothing else may import them.
RACERS = {
    "tools/bench_eval.py",
    "tools/bench_train.py",
    "tools/bench_generate.py",
    "tools/bench_ppo.py",
    "tools/ppo_racers.py",
    "engine/verification.py",
}


def imported_packages(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").split(".")[0]


def sources() -> list[Path]:
    return sorted(path for room in FLOORS for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downstairs_only(path: Path) -> None:
    relative = path.relative_to(ROOT)
    room = relative.parts[0]
    for line, package in imported_packages(path):
        assert package not in ORACLES or str(relative) in RACERS, f"{relative}:{line} imports {package} at run time"
        if package in FLOORS and package != room:
            assert FLOORS[package] < FLOORS[room], f"{relative}:{line}: {room} imports {package}"
