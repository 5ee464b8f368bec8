"""What races against other engines share: options, the model that both run, the peer's best size, and the page.

Who is raced and what is computed stands in the bench_*.py that begins the race.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.benchmark import Lap, append_record, machine, median_speed
from engine.shard import Precision
from model.config import PRESETS, ModelConfig, parameter_shapes
from model.errors import InputError
from model.hf import write_model
from model.init import initial_value

OURS = "this engine"
# Logits that two right computations may order either way: rounding of sums over a thousand numbers, and to spare.
NEAR_TIE = 1e-3
# Three times the usual spread of weights: logits then differ enough for greedy answers to be compared.
_LIVELY = 0.06

SMALL = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1376,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=1024,
)
_FIRST = {
    "Date": "date",
    "Device": "device",
    "Threads": "threads",
    "torch": "torch",
    "transformers": "transformers",
    "Precision": "precision",
}
_LAST = {"Rounds": "rounds", "Commit": "commit", "Note": "note"}


@dataclass
class RaceConfig:
    """How long a race takes, and what becomes of its figures."""

    rounds: int = 3
    """turns of each"""
    threads: int | None = None
    """threads of torch on a CPU; by default torch's choice"""
    out: str | None = None
    """append the result to OUT.jsonl and its table to OUT.md"""
    note: str = ""
    """a remark to keep with the result"""

    def check(self) -> None:
        """Raises InputError where numbers make no sense."""
        if self.rounds < 1:
            raise InputError(f"--rounds is {self.rounds}. Use at least 1.")

    def prepare(self) -> None:
        """Take the threads; transformers says nothing that is no error."""
        self.check()
        if self.threads:
            torch.set_num_threads(self.threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def require_shape(model: str | None) -> None:
    """Raises InputError where `--model` names no shape."""
    if model not in (None, "small", *PRESETS):
        raise InputError(f"--model is {model!r}. Use small, {', '.join(PRESETS)}.")


def shape_of(model: str | None, device: torch.device, large: str) -> tuple[str, ModelConfig]:
    """Name and shape of the model: `small` on a CPU and `large` on a GPU where none is named."""
    name = model or (large if device.type == "cuda" else "small")
    return name, SMALL if name == "small" else PRESETS[name]


def precision_on(device: torch.device) -> Precision:
    return "bf16" if device.type == "cuda" else "fp32"


def write_lively_model(directory: Path, shape: ModelConfig, seed: int, device: torch.device) -> None:
    """A model directory of fresh weights, in the precision of the race."""
    lively = ModelConfig(**{**vars(shape), "initializer_range": _LIVELY})
    values = ((name, initial_value(lively, name, size, seed)) for name, size in parameter_shapes(lively).items())
    write_model(directory, shape, values, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


def tokens_a_second(laps: dict[str, list[Lap]], peer: str) -> dict[str, Any]:
    """What a record says of speeds in tokens."""
    ours, its = median_speed(laps[OURS]), median_speed(laps[peer])
    return {
        "our tok/s": f"{ours:,.0f}",
        "peer's tok/s": f"{its:,.0f}",
        "ratio": f"{ours / its:.2f}",
        "speeds": {name: [round(lap.speed, 1) for lap in laps[name]] for name in laps},
    }


def keep(
    config: RaceConfig,
    device: torch.device,
    figures: dict[str, Any],
    columns: dict[str, str],
    title: str,
    command: str,
    told: str,
) -> None:
    """Print a record, and add it to the page where that was asked for.

    Args:
        figures: beside those of every race. columns: title and key of those that the page shows.
        title, command, told: what stands above the table: how it was made, and a paragraph on what was raced.
    """
    record = {
        **machine(device),
        "transformers": transformers.__version__,
        "precision": precision_on(device),
        **figures,
        "rounds": config.rounds,
        "note": config.note,
        "config": asdict(config),
    }
    for name, value in record.items():
        if not isinstance(value, dict | list):
            print(f"{name:<24}{value}")
    if config.out:
        text = textwrap.fill(told, 118, break_on_hyphens=False)
        heading = f"# {title}\n\n    {command} --out {config.out}\n\n{text}"
        append_record(Path(config.out), record, heading, {**_FIRST, **columns, **_LAST})
