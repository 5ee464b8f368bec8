"""A pre-training job of seconds: a folder with a base, its data and a recipe, and what such a run leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.loggers import read_rows
from tests.small_base import write_small_base, write_small_data
from tests.tools.in_child import Ended, Running, start_tool

RECIPE = """
model: base
out: run
data: {paths: [data.jsonl], workers: 1}
train: {steps: 4, micro_batch_tokens: 64, batch_tokens: 256}
checkpoint: {every: 2}
eval: {fraction: 0.1}
log: {tensorboard: false, curves: false}
"""

# What training computed, without what the clock says.
COMPUTED = ("step", "loss", "grad_norm", "lr", "tokens", "skipped", "held_out_loss")


def write_small_job(folder: Path) -> Path:
    """`base`, `data.jsonl` and `recipe.yaml` in a folder."""
    write_small_base(folder / "base")
    write_small_data(folder / "data.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def start_pretraining(
    folder: Path, out: str, *words: object, world: int = 1, before: Callable[[], None] | None = None
) -> Running:
    """The recipe's run in `folder/out`, with these words behind it."""
    command = ("--config", "recipe.yaml", "--out", out, *words)
    return start_tool("pretrain", *command, cwd=folder, world=world, before=before)


def pretrain(folder: Path, out: str, *words: object, world: int = 1, before: Callable[[], None] | None = None) -> Ended:
    """The same, run to its good end. Returns the first rank's."""
    ends = start_pretraining(folder, out, *words, world=world, before=before).wait()
    assert [ended.code for ended in ends] == [0] * world, ends[0].stderr
    return ends[0]


def rows(directory: Path) -> list[dict]:
    """Rows of metrics.jsonl, reduced to what was computed."""
    return [{name: row[name] for name in COMPUTED if name in row} for row in read_rows(directory / "metrics.jsonl")]


def losses(directory: Path) -> list[float]:
    """Training loss, step by step."""
    return [row["loss"] for row in rows(directory) if "loss" in row]


def held_out_losses(directory: Path) -> dict[int, float]:
    """Held-out loss by the number of steps behind it."""
    return {row["step"]: row["held_out_loss"] for row in rows(directory) if "held_out_loss" in row}


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def checkpoints(directory: Path) -> list[str]:
    """Complete ones, in order."""
    return sorted(marker.parent.name for marker in directory.glob("state/step-*/COMPLETE"))
