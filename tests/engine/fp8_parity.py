"""The loss of training with 8-bit products beside training without: `python -m tests.engine.fp8_parity [STEPS]`.

A small model reads the facts of the bundled sample byte by byte, from the same weights on the same batches: in bf16,
and in bf16 with 8-bit products; and for a measure of what is small, in bf16 from other weights on other batches. On a
CPU operands are rounded as on a GPU and what they stand for is multiplied, so losses say what the format costs, and
times nothing.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine.evaluation import held_out_loss
from engine.fp8 import use_fp8
from engine.guard import Guard, GuardConfig
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.optim import AdamW, OptimConfig
from engine.recompute import Recompute
from engine.shard import fill, parallelize
from engine.step import next_token_loss, train_step
from model.batch import IGNORE, PackedBatch
from model.config import PRESETS, parameter_shapes
from model.heads import CausalLM
from model.init import initial_value

FACTS = Path(__file__).resolve().parents[2] / "samples" / "knowledge"
CONTEXT, DOCUMENTS = 64, 8
CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    vocab_size=256,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    max_position_embeddings=CONTEXT,
)
RATE, WARMUP = 3e-3, 10


@contextmanager
def one_process() -> Iterator[Runtime]:
    yield start(ParallelConfig())
    stop()


def read_facts() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last twentieth of them, held out: uint8."""
    files = sorted(FACTS.rglob("*.yaml"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


def batch(text: Tensor, seed: int) -> PackedBatch:
    """Pieces from anywhere in the text."""
    starts = torch.randint(len(text) - CONTEXT, (DOCUMENTS, 1), generator=torch.Generator().manual_seed(seed))
    pieces = text[starts + torch.arange(CONTEXT + 1)].long()
    targets = pieces[:, 1:].clone()
    targets[:, -1] = IGNORE
    bounds = torch.arange(0, CONTEXT * DOCUMENTS + 1, CONTEXT, dtype=torch.int32)
    positions = torch.arange(CONTEXT).repeat(DOCUMENTS)
    return PackedBatch(pieces[:, :-1].flatten(), positions, bounds, targets.flatten(), DOCUMENTS, CONTEXT)


def train(
    steps: int, runtime: Runtime, *, fp8: bool, seed: int = 0, recompute: Recompute = "none"
) -> tuple[Tensor, float]:
    """The loss of every step, fp64 [steps], and the held-out loss in the end."""
    text, held_out = read_facts()
    with torch.device("meta"):
        model = CausalLM(CONFIG)
    if fp8:
        use_fp8(model, runtime.device)
    parallelize(model, runtime, ParallelConfig(), "bf16", recompute)
    fill(model, ((name, initial_value(CONFIG, name, shape, seed)) for name, shape in parameter_shapes(CONFIG).items()))
    optimizer, guard, objective = AdamW(model, OptimConfig()), Guard(GuardConfig(), runtime.device), next_token_loss()
    losses = []
    for step in range(steps):
        rate = RATE * min(1, (step + 1) / WARMUP)
        pack = batch(text, seed * 1_000_000 + step)
        report = train_step(model, optimizer, guard, objective, [pack], runtime, lr=rate).read()
        assert not report.was_skipped
        losses.append(report.loss)
    looks = [batch(held_out, -1 - number) for number in range(8)]
    return torch.tensor(losses, dtype=torch.float64), held_out_loss(model, objective, looks, runtime)


def main(steps: int) -> None:
    with one_process() as runtime:
        runs = {
            "bf16": train(steps, runtime, fp8=False),
            "8-bit products": train(steps, runtime, fp8=True),
            "bf16, another seed": train(steps, runtime, fp8=False, seed=1),
        }
    base, quarter = runs["bf16"][0], -(steps // 4)
    print("| run | loss, last quarter | from bf16, step by step | held-out loss |\n|---|---|---|---|")
    for name, (losses, held_out) in runs.items():
        gap = (losses - base)[quarter:].abs().mean()
        print(f"| {name} | {losses[quarter:].mean():.4f} | {gap:.4f} | {held_out:.4f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
