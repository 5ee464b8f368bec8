"""What the training benchmark runs: a shape, a context, a kind of documents; in order of importance.

A case is named shape-context-kind, as in 7b-4096-full, and any that can be named can be asked for:

    full    pre-training on documents as long as the context
    ragged  pre-training on documents of realistic lengths, packed
    sft     fine-tuning on conversations of realistic lengths, packed
    reward  a reward model on pairs of answers, packed
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from engine.memory import plan
from engine.memory_setup import Setup
from engine.recompute import Recompute
from engine.shard import Precision
from engine.step_seconds import Ranked, rank
from model.config import PRESETS, ModelConfig
from model.errors import InputError

Kind = Literal["full", "ragged", "sft", "reward"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SHAPES = {
    # 2.3 M parameters: a step of a second on a core, in which products are most of the work.
    "small": ModelConfig(
        vocab_size=2000,
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    ),
    # Steps of milliseconds.
    "mini": ModelConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=128,
    ),
    "1b": PRESETS["1b"],
    "7b": PRESETS["7b"],
    "13b": PRESETS["ziya2-13b"],
}
# Shapes whose layers are as many as the device's memory holds.
CUT = {"13b"}

# Those that answer most questions; the others follow.
_FIRST = ("7b-4096-full", "1b-4096-full", "7b-4096-sft", "1b-4096-sft", "7b-4096-ragged", "1b-4096-reward")
_ON_GPU = (("7b", 4096), ("1b", 4096), ("13b", 4096), ("7b", 8192), ("1b", 8192), ("13b", 8192))
_ON_CPU = (("small", 256), ("small", 512))
_MODES: tuple[Recompute, ...] = ("none", "selective", "full")
# Peers keep weights in bf16 beside fp32 masters, ours in halves of the masters: two bytes a parameter more.
_PEERS_EXTRA = 2


@dataclass(frozen=True)
class Case:
    """One row of contenders. model: as that shape is published; `fitted` cuts what is too large."""

    shape: str
    context: int
    kind: Kind
    model: ModelConfig

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.context}-{self.kind}"


def named(name: str) -> Case:
    """The case of a name.

    Raises:
        InputError: it names no shape, or no kind.
    """
    found = re.fullmatch(r"(\w+)-(\d+)-(\w+)", name)
    if found is None or found[1] not in SHAPES or found[3] not in KINDS:
        raise InputError(
            f"--cases: {name} is no case. Write shape-context-kind, such as 7b-4096-full, with a shape of "
            f"{', '.join(SHAPES)} and a kind of {', '.join(KINDS)}."
        )
    shape, context = SHAPES[found[1]], int(found[2])
    head: Literal["lm", "score"] = "score" if found[3] == "reward" else "lm"
    model = replace(shape, max_position_embeddings=max(context, shape.max_position_embeddings), context=context)
    return Case(found[1], context, found[3], replace(model, head=head))  # type: ignore[arg-type]


def default_cases(is_on_gpu: bool) -> list[Case]:
    """All of them, the most important first."""
    places = _ON_GPU if is_on_gpu else _ON_CPU
    every = [f"{shape}-{context}-{kind}" for (shape, context), kind in itertools.product(places, KINDS)]
    first = [name for name in _FIRST if name in every]
    return [named(name) for name in [*first, *(name for name in every if name not in first)]]


def ways(
    case: Case,
    batch_tokens: int,
    precision: Precision,
    device_bytes: int | None,
    recompute: Recompute | None = None,
    tokens_per_pack: int | None = None,
    gpu: str = "H200",
) -> Ranked:
    """The ways to run our side that fit, by predicted seconds of a step.

    Args:
        batch_tokens: of an optimizer step.
        device_bytes: what a GPU has; None on a CPU, where everything fits and a step has two packs.
        recompute, tokens_per_pack: take these.
        gpu: whose data sheet predicts.
    Raises:
        InputError: packs that do not divide the step or hold no document, or nothing that fits.
    """
    at_least = 2 * case.context if case.kind == "reward" else case.context  # both answers to a prompt
    if tokens_per_pack:
        sizes = [tokens_per_pack]
    elif device_bytes is None:
        sizes = [max(at_least, batch_tokens // 2)]
    else:
        sizes = [batch_tokens // parts for parts in (1, 2, 4, 8, 16, 32) if batch_tokens % parts == 0]
    sizes = [size for size in sizes if size >= at_least and batch_tokens % size == 0]
    if not sizes:
        raise InputError(
            f"--batch_tokens {batch_tokens} does not divide into packs that hold {at_least} tokens, as "
            f"{case.name} needs. Use {at_least} times a power of two; --tokens_per_pack, if given, divides it."
        )
    setups = [
        Setup(
            size,
            case.context,
            precision=precision,
            recompute=mode,
            micro_batches=batch_tokens // size,
            device="cpu" if device_bytes is None else "cuda",
        )
        for mode in ([recompute] if recompute else _MODES)
        for size in sizes
    ]
    if device_bytes is None:
        return Ranked([plan(case.model, setups[0])], "")
    return rank((plan(case.model, setup) for setup in setups), device_bytes, gpu)


def fitted(case: Case, batch_tokens: int, precision: Precision, device_bytes: int | None) -> Case:
    """The case with as many layers as the device holds, where its shape is one that is cut: on our side without
    recomputation in the smallest packs, and with what the peers need beside it."""
    if case.shape not in CUT or device_bytes is None:
        return case

    def fits(layers: int) -> bool:
        cut = replace(case, model=replace(case.model, num_layers=layers))
        room = device_bytes - _PEERS_EXTRA * cut.model.num_parameters
        return bool(ways(cut, batch_tokens, precision, room, recompute="none").plans)

    layers = next((count for count in range(case.model.num_layers, 0, -1) if fits(count)), 0)
    if not layers:
        raise InputError(f"No layer of {case.name} fits this device. Choose other --cases.")
    return replace(case, model=replace(case.model, num_layers=layers))
