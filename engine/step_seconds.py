"""How long an optimizer step takes on one GPU, by arithmetic: what to recompute, and in packs of which size.

Of T tokens a micro-batch, M micro-batches, N parameters, b bytes a number, by the figures of a data sheet:

    products    those of the blocks and of the head, and attention of full-length documents, at half the peak
    recomputed  selective: two norms and an activation, (4 d + 3 F) b bytes a token and block; full: the blocks' forward
                pass once more, a third of their operations
    gradients   sums in fp32, to which products add: 4 N bytes are written in the first micro-batch, and 8 N read and
                written in each further one
    the host    puts a block's two passes on the queue in 0.6 ms (docs/performance.md): a micro-batch takes no less

Larger products come nearer to the peak, which is not counted: it speaks for larger packs, as what is counted does. Nor
is what all ways have in common: the update, and the head's work on its logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.memory import MemoryPlan, Setup
from engine.metrics import PEAKS
from model.config import ModelConfig

REACHED = 0.5  # of the peak, by products and attention
# Bytes a second, of NVIDIA's data sheets (A100: 80 GB).
BANDWIDTHS = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12}
HOST_SECONDS_A_BLOCK = 0.6e-3
SUM_BYTES = 4


class StepSeconds(NamedTuple):
    """Of one optimizer step; host: in which the device waits for it."""

    products: float
    recomputed: float
    gradients: float
    host: float

    @property
    def total(self) -> float:
        return sum(self)


def is_known(setup: Setup) -> bool:
    """Whether `step_seconds` says something of it."""
    return setup.world == 1 and setup.precision == "bf16" and setup.lora is None


def step_seconds(config: ModelConfig, setup: Setup, gpu: str = "H200") -> StepSeconds:
    """Seconds of a step of one process in bf16 that trains all weights.

    Args:
        gpu: a name of `BANDWIDTHS`.
    """
    assert is_known(setup)
    head = config.hidden_size * (config.vocab_size if config.head == "lm" else 1)
    tokens, rate, bandwidth = setup.tokens_per_pack, REACHED * PEAKS[gpu], BANDWIDTHS[gpu]
    products = tokens * config.flops_per_token(setup.context, causal=True) / rate
    recomputed = 0.0
    if setup.recompute == "selective":
        numbers = tokens * config.num_layers * (4 * config.hidden_size + 3 * config.intermediate_size)
        recomputed = setup.number_bytes * numbers / bandwidth
    elif setup.recompute == "full":
        recomputed = (products - 6 * head * tokens / rate) / 3
    adding = 2 * SUM_BYTES * config.num_parameters / bandwidth
    count = setup.micro_batches
    host = max(0.0, config.num_layers * HOST_SECONDS_A_BLOCK - products - recomputed - adding)
    return StepSeconds(count * products, count * recomputed, (count - 0.5) * adding, count * host)


class Ranked(NamedTuple):
    """Plans that fit, those of the shortest step first, and why the first of them is."""

    plans: list[MemoryPlan]
    reason: str


def rank(plans: Iterable[MemoryPlan], device_bytes: int, gpu: str = "H200") -> Ranked:
    """Compare plans of one model, for the same tokens a step, by the seconds of a step.

    Args:
        plans: of setups that `step_seconds` knows.
        gpu: a name of `BANDWIDTHS`.
    """
    timed = sorted(((step_seconds(one.config, one.setup, gpu).total, one) for one in plans), key=lambda pair: pair[0])
    places = [place for place, (_, one) in enumerate(timed) if one.fits(device_bytes)]
    shown = timed[: places[1] + 1 if len(places) > 1 else None]  # what would be faster, the choice, and the next best
    told = (f"{_name(one)} {seconds:.3f}{'' if one.fits(device_bytes) else ' (too large)'}" for seconds, one in shown)
    return Ranked([timed[place][1] for place in places], f"predicted seconds a step: {', '.join(told)}")


def _name(plan: MemoryPlan) -> str:
    return f"{plan.setup.recompute} in packs of {plan.setup.tokens_per_pack:,}"
