"""The loss of training with 8-bit products beside training without: `python -m tests.engine.fp8_parity STAGE [STEPS]`.

A small model reads the bundled sample byte by byte, from the same weights on the same batches: in bf16, and in bf16
with 8-bit products; and for a measure of what is small, in bf16 from other weights on other batches. The stages:

    pretraining  pieces of the files of facts
    sft          conversations, of which doctors' answers are learned
    reward       groups of answers to a question, by their grades; from what STEPS of sft in bf16 have made

On a CPU operands are rounded as on a GPU and what they stand for is multiplied, so losses say what the format costs,
and times nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from engine.data.ranked_batch import RankedBatch
from engine.evaluation import held_out_loss
from engine.fp8 import use_fp8
from engine.guard import Guard, GuardConfig
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.optim import AdamW, OptimConfig
from engine.recompute import Recompute
from engine.shard import fill, parallelize
from engine.step import MicroBatch, Objective, next_token_loss, train_step
from model.batch import IGNORE, PackedBatch
from model.chat import Message
from model.config import PRESETS, ModelConfig, parameter_shapes
from model.heads import CausalLM, ScalarModel
from model.init import initial_value
from rlhf.reward_model import ranking_objective
from samples.dialogues import Dialogue, render_dialogues
from samples.knowledge import load_knowledge
from samples.preferences import Comparison, render_preferences

StageName = Literal["pretraining", "sft", "reward"]
FACTS = Path(__file__).resolve().parents[2] / "samples" / "knowledge"
CONTEXT, DOCUMENTS = 64, 8
# Bytes that no text has: they begin and end what is said.
END, ROLES = 0, {"user": 1, "assistant": 2, "system": 3}
# Longer conversations are left out; so are comparisons with a longer answer.
LONGEST, CONVERSATIONS, COMPARISONS = 256, 8, 4
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
# The demo's, of configs/demo_*.yaml.
RATES: dict[StageName, float] = {"pretraining": 3e-3, "sft": 2e-3, "reward": 3e-4}
WARMUP = 10
LOOKS = 8  # held-out batches


@contextmanager
def one_process() -> Iterator[Runtime]:
    yield start(ParallelConfig())
    stop()


class Stage(NamedTuple):
    """What learns from what. batch: of a seed, from what is trained on (0) or held out (1)."""

    config: ModelConfig
    objective: Objective[Any]
    batch: Callable[[int, int], MicroBatch]


def stage_of(name: StageName) -> Stage:
    chat = dataclasses.replace(CONFIG, max_position_embeddings=LONGEST)
    if name == "pretraining":
        return Stage(CONFIG, next_token_loss(), pieces)
    if name == "sft":
        return Stage(chat, next_token_loss(), conversations)
    return Stage(dataclasses.replace(chat, head="score"), ranking_objective("pairwise", 0.0, 0.0), comparisons)


@functools.cache
def read_facts() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last twentieth of them, held out: uint8."""
    files = sorted(FACTS.rglob("*.yaml"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


@functools.cache
def read_conversations() -> tuple[list[Dialogue], ...]:
    sides = render_dialogues(load_knowledge())
    return tuple([one for one in side if len(spoken(one.messages)[0]) <= LONGEST] for side in sides)


@functools.cache
def read_comparisons() -> tuple[list[Comparison], ...]:
    sides = render_preferences(load_knowledge())
    return tuple([one for one in side if max(len(ids) for ids, _ in answers(one)) <= LONGEST] for side in sides)


def spoken(messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """A conversation's bytes, and which of them are an answer's or its end."""
    ids: list[int] = []
    is_answer: list[bool] = []
    for message in messages:
        text = [*message.content.encode(), END]
        ids += [ROLES[message.role], *text]
        is_answer += [False] + [message.role == "assistant"] * len(text)
    return ids, is_answer


def answers(comparison: Comparison) -> list[tuple[list[int], list[bool]]]:
    """The question with each of the answers."""
    return [spoken((*comparison.prompt, Message("assistant", one.text))) for one in comparison.responses]


def drawn(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:count]
    return [items[index] for index in chosen.tolist()]


def packed(documents: Sequence[tuple[list[int], list[bool]]], context: int) -> PackedBatch:
    """Documents of bytes one behind the other; those that are marked are targets."""
    tokens = torch.tensor([token for ids, _ in documents for token in ids])
    is_target = torch.tensor([marked for _, marks in documents for marked in marks])
    bounds = torch.tensor([0, *(len(ids) for ids, _ in documents)]).cumsum(0)
    targets = tokens.where(is_target, IGNORE).roll(-1)  # a first byte is no target, so none is of the document before
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in documents])
    return PackedBatch(tokens, positions, bounds.int(), targets, len(documents), context)


def pieces(side: int, seed: int) -> PackedBatch:
    """Pieces from anywhere in the facts."""
    text = read_facts()[side]
    starts = torch.randint(len(text) - CONTEXT, (DOCUMENTS, 1), generator=torch.Generator().manual_seed(seed))
    cut = text[starts + torch.arange(CONTEXT)].tolist()
    return packed([(ids, [False] + [True] * (CONTEXT - 1)) for ids in cut], CONTEXT)


def conversations(side: int, seed: int) -> PackedBatch:
    return packed([spoken(one.messages) for one in drawn(read_conversations()[side], CONVERSATIONS, seed)], LONGEST)


def comparisons(side: int, seed: int) -> RankedBatch:
    """Whole groups of answers, with their grades."""
    chosen = drawn(read_comparisons()[side], COMPARISONS, seed)
    pack = packed([sequence for one in chosen for sequence in answers(one)], LONGEST)
    numbers = torch.tensor([number for number, one in enumerate(chosen) for _ in one.responses])
    grades = torch.tensor([response.score for one in chosen for response in one.responses])
    most = max(len(one.responses) for side in read_comparisons() for one in side)
    return RankedBatch(pack, pack.cu_seqlens[1:].long() - 1, numbers, grades, torch.arange(len(numbers)), most)


class Trained(NamedTuple):
    """losses: of every step, fp64 [steps]. held_out: the loss in the end. weights: fp32, by name."""

    losses: Tensor
    held_out: float
    weights: dict[str, Tensor]


def train(
    steps: int,
    runtime: Runtime,
    *,
    fp8: bool,
    stage: StageName = "pretraining",
    base: dict[str, Tensor] | None = None,
    seed: int = 0,
    recompute: Recompute = "none",
) -> Trained:
    """A run from the weights of a base, and where it has none from fresh ones."""
    config, objective, batch = stage_of(stage)
    with torch.device("meta"):
        model: nn.Module = ScalarModel(config) if config.head == "score" else CausalLM(config)
    if fp8:
        use_fp8(model, runtime.device)
    parallelize(model, runtime, ParallelConfig(), "bf16", recompute)
    fresh = {name: initial_value(config, name, shape, seed) for name, shape in parameter_shapes(config).items()}
    fill(model, ((name, (base or {}).get(name, value)) for name, value in fresh.items()))
    optimizer, guard = AdamW(model, OptimConfig()), Guard(GuardConfig(), runtime.device)
    losses = []
    for step in range(steps):
        rate = RATES[stage] * min(1, (step + 1) / WARMUP)
        pack = batch(0, seed * 1_000_000 + step)
        report = train_step(model, optimizer, guard, objective, [pack], runtime, lr=rate).read()
        assert not report.was_skipped
        losses.append(report.loss)
    looks = [batch(1, -1 - number) for number in range(LOOKS)]
    held_out = held_out_loss(model, objective, looks, runtime)
    weights = {name: value.detach().float() for name, value in model.named_parameters()}
    return Trained(torch.tensor(losses, dtype=torch.float64), held_out, weights)


def base_of(stage: StageName, steps: int, runtime: Runtime, seed: int) -> dict[str, Tensor] | None:
    """What a reward model is trained from."""
    return train(steps, runtime, fp8=False, stage="sft", seed=seed).weights if stage == "reward" else None


def main(stage: StageName, steps: int) -> None:
    with one_process() as runtime:
        base, other = (base_of(stage, steps, runtime, seed) for seed in (0, 1))
        runs = {
            "bf16": train(steps, runtime, fp8=False, stage=stage, base=base),
            "8-bit products": train(steps, runtime, fp8=True, stage=stage, base=base),
            "bf16, other weights and batches": train(steps, runtime, fp8=False, stage=stage, base=other, seed=1),
        }
    plain, quarter = runs["bf16"].losses, -(steps // 4)
    print("| run | loss, last quarter | from bf16, step by step | held-out loss |\n|---|---|---|---|")
    for name, (losses, held_out, _) in runs.items():
        gap = (losses - plain)[quarter:].abs().mean()
        print(f"| {name} | {losses[quarter:].mean():.4f} | {gap:.4f} | {held_out:.4f} |", flush=True)


if __name__ == "__main__":
    name, *count = sys.argv[1:] or ["pretraining"]
    if name not in get_args(StageName) or not all(map(str.isdecimal, count)):
        sys.exit(f"usage: python -m tests.engine.fp8_parity {'|'.join(get_args(StageName))} [STEPS]")
    main(name, int(count[0]) if count else 200)  # type: ignore[arg-type]
