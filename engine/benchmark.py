"""What races share: laps and their speeds, turns, the peer's best size, the machine, and the page of records.

Speeds are in real tokens: padding does not count, whoever makes it. Racers take turns, so that whatever else the
machine does falls on all of them; the median round stands for each.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from model.config import ModelConfig


@dataclass(frozen=True)
class Lap:
    """One turn: real tokens, seconds in all, and those of them spent waiting for data."""

    tokens: int
    seconds: float
    data_wait: float = 0.0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Racer(Protocol):
    """Something that works, a turn at a time."""

    def step(self) -> Lap: ...


def race(racers: Mapping[str, Racer], rounds: int) -> dict[str, list[Lap]]:
    """Every racer takes a lap in turn, so many times."""
    laps: dict[str, list[Lap]] = {name: [] for name in racers}
    for name in turns(list(racers), rounds):
        laps[name].append(racers[name].step())
    return laps


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Whose turn it is, so many rounds; the order turns round, so that nobody is always first."""
    for index in range(rounds):
        yield from names[:: 1 if index % 2 == 0 else -1]


def median_speed(laps: list[Lap]) -> float:
    return statistics.median(lap.speed for lap in laps)


def speeds_by_size(sizes: Sequence[int], speed: Callable[[int], float]) -> dict[int, float]:
    """Speeds at ascending sizes, until two in a row are slower than the best or the memory is full."""
    speeds: dict[int, float] = {}
    for size in sizes:
        try:
            speeds[size] = speed(size)
        except torch.cuda.OutOfMemoryError:
            break
        if max(speeds.values()) > max(list(speeds.values())[-2:]):
            break
    return speeds


def fastest(speeds: dict[Any, float]) -> Any:
    """The key of the highest speed."""
    return max(speeds, key=lambda key: speeds[key])


def useful_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Floating-point operations of training on documents of these lengths, forward and backward, nothing recomputed.

    6 N a token, with N the parameters of all matrices but the input embedding (Chowdhery et al. 2022, PaLM, appendix
    B), and 12 L H h for each pair of a token and one that it sees, itself included: L layers, H heads of width h.
    """
    sizes = list(lengths)
    pairs = sum(size * (size + 1) // 2 for size in sizes)
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    return 6.0 * config.num_matmul_parameters * sum(sizes) + float(attention) * pairs


def free() -> None:
    """Give the device back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def now(device: torch.device) -> float:
    """Seconds on a clock that has waited for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code: device, threads, versions, date, commit."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Short hash, with a + where files under version control differ from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append_record(path: Path, record: dict[str, Any], heading: str, columns: dict[str, str]) -> None:
    """Add a record to `path`.jsonl, and write all of its records as a table to `path`.md.

    Args:
        heading: what stands above the table.
        columns: title and key of each column, in order; keys that a record lacks are left blank.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.with_suffix(".jsonl")
    with open(lines, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    table = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    table += [f"| {' | '.join(str(row.get(key, '')) for key in columns.values())} |" for row in records]
    path.with_suffix(".md").write_text(f"{heading}\n\n" + "\n".join(table) + "\n", encoding="utf-8")
