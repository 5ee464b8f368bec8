"""Throughput of the training step: a committed shape, documents of committed lengths, rounds taken in turn.

Speeds are in real tokens: padding does not count, whoever makes it. Two racers take turns, a step each, so that
whatever else the machine does falls on both; the median round stands for each.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.data.corpus import Corpus, open_corpus
from engine.data.loader import PackLoader
from engine.data.mixture import Mixture
from engine.data.prepare import prepare
from engine.guard import Guard, GuardConfig
from engine.mesh import ParallelConfig, Runtime
from engine.optim import AdamW, OptimConfig
from engine.shard import Precision, fill, parallelize
from engine.step import next_token_loss, train_step
from model.config import ModelConfig, parameter_shapes
from model.heads import CausalLM
from model.init import initial_value

# Where the code points of the benchmark's texts begin: one character is one token.
_FIRST_CHARACTER = 0x4E00


@dataclass
class BenchShape:
    """The model that is trained, and the text that it is trained on."""

    vocab_size: int = 8192
    """rows of the embedding and of the head"""
    hidden_size: int = 512
    """width of the residual stream"""
    intermediate_size: int = 1376
    """width of the feed-forward layers"""
    num_layers: int = 8
    """blocks"""
    num_heads: int = 8
    """query heads"""
    num_kv_heads: int = 8
    """key-value heads"""
    context: int = 512
    """longest document"""
    documents: int = 2000
    """documents in the corpus, every one different"""
    median_length: int = 180
    """of documents in tokens, whose lengths are lognormal: half are shorter"""
    spread: float = 0.8
    """standard deviation of the logarithm of lengths; they are clipped to 16 and the context"""
    seed: int = 0
    """of lengths, texts, order and weights"""

    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            max_position_embeddings=self.context,
        )

    def lengths(self) -> np.ndarray:
        """Tokens of every document: int64 [documents]."""
        drawn = np.random.default_rng(self.seed).lognormal(np.log(self.median_length), self.spread, self.documents)
        return np.clip(drawn, 16, self.context).astype(np.int64)


class _OneIdACharacter:
    """A tokenizer that costs nothing: the corpus is prepared as any other is."""

    bos_id = None
    eos_id = 0
    add_bos = False
    fingerprint = "one id a character"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: list[str], /) -> list[list[int]]:
        return [[ord(character) - _FIRST_CHARACTER for character in text] for text in texts]

    def save(self, directory: Path, /) -> None:
        directory.mkdir()


def bench_corpus(shape: BenchShape, directory: Path) -> Corpus:
    """Write documents of the shape's lengths with random characters, prepare them and open them."""
    random = np.random.default_rng(shape.seed + 1)
    largest = min(shape.vocab_size, 0x9FFF - _FIRST_CHARACTER)
    raw = directory / "raw.jsonl"
    with open(raw, "w", encoding="utf-8") as file:
        for length in shape.lengths():
            # An end token follows every text.
            text = "".join(map(chr, _FIRST_CHARACTER + random.integers(1, largest, length - 1)))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return open_corpus([prepare([raw], _OneIdACharacter(shape.vocab_size), directory / "prepared", workers=1)])


@dataclass(frozen=True)
class Lap:
    """One optimizer step: real tokens, seconds in all, and those of them spent waiting for data."""

    tokens: int
    seconds: float
    data_wait: float = 0.0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Racer(Protocol):
    """Something that trains, a step at a time."""

    def step(self) -> Lap: ...


class Engine:
    """The training step of this project, fed by its loader.

    Args:
        tokens_per_pack: of a forward pass.
        batch_tokens: of an optimizer step.
    """

    def __init__(
        self,
        shape: BenchShape,
        corpus: Corpus,
        runtime: Runtime,
        precision: Precision,
        tokens_per_pack: int,
        batch_tokens: int,
    ) -> None:
        config = shape.model()
        with torch.device("meta"):
            self._model = CausalLM(config)
        parallelize(self._model, runtime, ParallelConfig(), precision, "none")
        shapes = parameter_shapes(config)
        fill(
            self._model,
            ((name, initial_value(config, name, shapes[name], shape.seed, runtime.device)) for name in shapes),
        )
        self._runtime = runtime
        self._optimizer = AdamW(self._model, OptimConfig())
        self._guard = Guard(GuardConfig(), runtime.device)
        self._objective = next_token_loss()
        self._loader = PackLoader(corpus, shape.seed, tokens_per_pack, shape.context, batch_tokens // tokens_per_pack)

    def step(self) -> Lap:
        before = self._loader.cursor["tokens"]
        begin = now(self._runtime.device)
        report = train_step(
            self._model,
            self._optimizer,
            self._guard,
            self._objective,
            self._loader.next_step(),
            self._runtime,
            lr=1e-4,
        )
        assert np.isfinite(report.read().loss)
        seconds = now(self._runtime.device) - begin
        return Lap(self._loader.cursor["tokens"] - before, seconds, self._loader.wait_seconds)

    @property
    def padding_share(self) -> float:
        return self._loader.padding_share

    def close(self) -> None:
        self._loader.close()


def steps_of_documents(corpus: Corpus, seed: int, batch_tokens: int) -> Iterator[list[torch.Tensor]]:
    """For a trainer that takes documents as they are: int64 [L] each, about `batch_tokens` together, without end."""
    mixture = Mixture(corpus, seed)
    step: list[torch.Tensor] = []
    epoch = 0
    while True:
        for document in mixture.documents(epoch, 0, mixture.epoch_length(epoch)).tolist():
            step.append(torch.from_numpy(corpus.read(document).astype(np.int64)))
            if sum(map(len, step)) >= batch_tokens:
                yield step
                step = []
        epoch += 1


def race(racers: dict[str, Racer], rounds: int) -> dict[str, list[Lap]]:
    """Every racer takes a step in turn, so many times; the order turns round, so that nobody is always first."""
    laps: dict[str, list[Lap]] = {name: [] for name in racers}
    for index in range(rounds):
        for name in racers if index % 2 == 0 else reversed(racers):
            laps[name].append(racers[name].step())
    return laps


def median_speed(laps: list[Lap]) -> float:
    return statistics.median(lap.speed for lap in laps)


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
