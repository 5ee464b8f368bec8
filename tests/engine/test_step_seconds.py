"""What a step on one GPU takes by arithmetic: figures worked out by hand, and the choice that follows from them."""

from __future__ import annotations

import pytest

from engine.memory import Setup, plan
from engine.step_seconds import rank, step_seconds
from model.config import PRESETS

GIB = 1 << 30
BATCH = 32768
# d 4096, F 11008, 32 blocks
SEVEN = PRESETS["7b"]
BLOCKS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
HEAD = 4096 * SEVEN.vocab_size
ATTENTION = 6 * 32 * 4096 * 4096  # a token of full documents: half of 12 L d C


def setup(tokens: int, recompute: str = "none", context: int = 4096) -> Setup:
    return Setup(tokens, context, recompute=recompute, micro_batches=BATCH // tokens)  # type: ignore[arg-type]


def test_products_are_six_operations_a_parameter_and_causal_attention_at_half_the_peak() -> None:
    expected = BATCH * (6 * (BLOCKS + HEAD) + ATTENTION) / (0.5 * 989e12)
    assert step_seconds(SEVEN, setup(8192)).products == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("tokens", [8192, 32768])
def test_recomputing_costs_the_same_in_packs_of_any_size(tokens: int) -> None:
    assert step_seconds(SEVEN, setup(tokens)).recomputed == 0
    moved = 2 * BATCH * 32 * (4 * 4096 + 3 * 11008)
    assert step_seconds(SEVEN, setup(tokens, "selective")).recomputed == pytest.approx(moved / 4.8e12)
    forward = BATCH * (2 * BLOCKS + ATTENTION / 3) / (0.5 * 989e12)
    assert step_seconds(SEVEN, setup(tokens, "full")).recomputed == pytest.approx(forward, rel=1e-3)


def test_sums_of_gradients_are_written_once_and_then_read_and_written() -> None:
    for tokens, written in ((32768, 4), (8192, 4 + 3 * 8)):
        expected = written * SEVEN.num_parameters / 4.8e12
        assert step_seconds(SEVEN, setup(tokens)).gradients == pytest.approx(expected)


def test_a_micro_batch_takes_no_less_than_the_host() -> None:
    assert step_seconds(SEVEN, setup(4096)).host == 0
    tiny = step_seconds(PRESETS["tiny"], setup(64, context=64))
    assert tiny.total == pytest.approx(BATCH / 64 * PRESETS["tiny"].num_layers * 0.6e-3, rel=0.01)


def test_slower_memory_makes_what_moves_dearer() -> None:
    here, there = (step_seconds(SEVEN, setup(8192, "selective"), gpu) for gpu in ("H200", "H100"))
    assert there.products == here.products
    assert there.gradients / here.gradients == pytest.approx(4.8 / 3.35)
    assert there.recomputed / here.recomputed == pytest.approx(4.8 / 3.35)


def test_recomputation_is_taken_where_it_costs_less_than_more_micro_batches_and_not_elsewhere() -> None:
    """Of 7b: selectively 21.6 ms a step; each micro-batch more 11.2 ms."""

    def best(device_bytes: int, tokens: list[int]) -> tuple[str, int]:
        plans = [plan(SEVEN, setup(size, mode)) for mode in ("none", "selective", "full") for size in tokens]
        first = rank(plans, device_bytes).plans[0].setup
        return first.recompute, first.tokens_per_pack

    def between(one: Setup, *others: Setup) -> int:
        """A device that holds the first, and none of those that are faster."""
        needed = plan(SEVEN, one).needed_bytes
        assert all(plan(SEVEN, other).needed_bytes > needed for other in others)
        return needed

    # Four micro-batches and recomputation, rather than eight without; two without, rather than one with it.
    room = between(setup(8192, "selective"), setup(8192))
    assert best(room, [8192, 4096]) == ("selective", 8192)
    assert plan(SEVEN, setup(4096)).needed_bytes <= room  # it could
    room = plan(SEVEN, setup(32768, "selective")).needed_bytes
    assert plan(SEVEN, setup(16384)).needed_bytes <= room < plan(SEVEN, setup(32768)).needed_bytes
    assert best(room, [32768, 16384]) == ("none", 16384)


def test_the_reason_names_what_is_faster_and_does_not_fit_and_the_next_best() -> None:
    plans = [plan(SEVEN, setup(size, mode)) for mode in ("none", "selective", "full") for size in (8192, 4096)]
    told = rank(plans, plan(SEVEN, setup(8192, "selective")).needed_bytes)
    names = [part.rsplit(" ", 1)[0] for part in told.reason.removeprefix("predicted seconds a step: ").split(", ")]
    assert told.reason.startswith("predicted seconds a step: none in packs of 8,192 2.892 (too large), selective")
    assert names[1:] == ["selective in packs of 8,192", "none in packs of 4,096"]
    assert not rank(plans, GIB).plans and rank(plans, GIB).reason.count("(too large)") == len(plans)
