"""NEFTune's noise: its size, and what it depends on."""

from __future__ import annotations

import math

import pytest
import torch

from engine.neftune import neftune
from engine.step import next_token_loss
from model.batch import IGNORE, PackedBatch

T, WIDTH, ALPHA = 1024, 96, 5.0
LENGTHS = [700, 3, 200, 21]  # and a tail


def pack(index: int = 0) -> PackedBatch:
    bounds = torch.full((20,), T, dtype=torch.int32)
    bounds[: len(LENGTHS) + 1] = torch.tensor([0, *LENGTHS]).cumsum(0)
    starts = bounds[:-1].repeat_interleave(bounds.diff(), output_size=T)
    rows = torch.zeros(T, dtype=torch.int64)
    return PackedBatch(rows, torch.arange(T) - starts, bounds, rows + IGNORE, len(LENGTHS), T, index=index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_uniform_with_alpha_over_the_root_of_length_times_width(dtype: torch.dtype) -> None:
    noise = neftune(ALPHA, WIDTH, 0, dtype)(pack())
    assert noise.shape == (T, WIDTH) and noise.dtype == dtype
    begin = 0
    for length in LENGTHS:
        bound = ALPHA / math.sqrt(length * WIDTH)
        unit = noise[begin : begin + length].double().flatten() / bound
        begin += length
        n = unit.numel()
        assert unit.abs().max() <= 1 + 2**-7  # two roundings to bf16
        assert unit.abs().max() > 1 - 20 / n, "the bound is reached"
        # Of U(-1, 1): mean 0 and variance 1/3; the square's mean 1/3 and variance 4/45. Five standard errors.
        assert abs(unit.mean()) < 5 * math.sqrt(1 / 3 / n)
        assert abs(unit.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n) + 2**-7


def test_noise_is_a_function_of_seed_and_pack_alone() -> None:
    noise = neftune(ALPHA, WIDTH, 3, torch.float32)
    first = noise(pack(7))
    torch.rand(11)
    noise(pack(8))
    assert torch.equal(neftune(ALPHA, WIDTH, 3, torch.float32)(pack(7)), first)
    assert not torch.equal(noise(pack(8)), first)
    assert not torch.equal(neftune(ALPHA, WIDTH, 4, torch.float32)(pack(7)), first)


def test_no_two_positions_share_their_noise() -> None:
    noise = neftune(ALPHA, WIDTH, 0, torch.float32)(pack())
    unit = noise / noise.abs().amax(dim=1, keepdim=True)
    correlation = torch.corrcoef(unit)
    correlation.fill_diagonal_(0)
    # The largest of half a million correlations over 96 numbers; six standard errors of one.
    assert correlation.abs().max() < 6 / math.sqrt(WIDTH)


def test_the_objective_adds_it_to_the_embeddings() -> None:
    given: list[torch.Tensor | None] = []

    def model(batch: PackedBatch, **how: object) -> tuple[torch.Tensor, torch.Tensor]:
        given.append(how["embedding_noise"])  # type: ignore[arg-type]
        return torch.zeros(()), torch.zeros(())

    noise = neftune(ALPHA, WIDTH, 0, torch.float32)
    next_token_loss(embedding_noise=noise)(model, pack(2))  # type: ignore[arg-type]
    next_token_loss()(model, pack(2))  # type: ignore[arg-type]
    assert given[0] is not None and torch.equal(given[0], noise(pack(2)))
    assert given[1] is None
