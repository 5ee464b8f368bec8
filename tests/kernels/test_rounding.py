"""fp32 to bf16 in a kernel: to the nearest even bit for bit, and at random without a bias."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rounding import nearest_bfloat16, stochastic_bfloat16, stochastic_bfloat16_reference
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

each_rounding = pytest.mark.parametrize("face", ["reference", "triton"])


@triton.jit
def _round_kernel(x_ptr, y_ptr, step_ptr, count, seed, first, IS_STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    x = tl.load(x_ptr + index, mask=inside)
    rounded = stochastic_bfloat16(x, seed, first + index, tl.load(step_ptr)) if IS_STOCHASTIC else nearest_bfloat16(x)
    tl.store(y_ptr + index, rounded, mask=inside)


def nearest(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.uint16, device=x.device)
    grid = (triton.cdiv(x.numel(), 16384),)
    _round_kernel[grid](x, y, None, x.numel(), 0, 0, IS_STOCHASTIC=False, BLOCK=16384)
    return y.view(torch.bfloat16)


def at_random(face: str, x: Tensor, seed: int = 7, first: int = 0, step: int = 1) -> Tensor:
    count = torch.tensor(step, device=x.device)
    if face == "reference":
        return stochastic_bfloat16_reference(x, seed, first, count)
    y = torch.empty(x.shape, dtype=torch.uint16, device=x.device)
    grid = (triton.cdiv(x.numel(), 4096),)
    _round_kernel[grid](x, y, count, x.numel(), seed, first, IS_STOCHASTIC=True, BLOCK=4096)
    return y.view(torch.bfloat16)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def every_upper_half(lower: int) -> Tensor:
    """All 65536 sign, exponent and leading mantissa bits, infinities, NaN and denormals among them."""
    upper = torch.arange(-(2**15), 2**15, device=DEVICE)
    return ((upper << 16) + lower).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("lower", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_nearest_is_the_cast_for_every_upper_half(lower: int) -> None:
    x = every_upper_half(lower)
    ours, cast = nearest(x), x.bfloat16()
    number = ~x.isnan()
    assert torch.equal(bits(ours)[number], bits(cast)[number])
    assert ours[~number].isnan().all() and x.isnan().sum() >= 2 * 127


@each_rounding
@pytest.mark.parametrize("lower", [0, 0x0100, 0x8000, 0xFF00])
def test_random_rounding_yields_neighbours_only(face: str, lower: int) -> None:
    x = every_upper_half(lower)
    rounded = at_random(face, x)
    number = ~x.isnan()
    # Towards zero is cutting the lower half off; the next bits up are the other neighbour, infinity included.
    down = (x.view(torch.int32) >> 16).to(torch.int16)
    steps = (bits(rounded) - down)[number]
    # What bf16 holds stays, infinities included.
    assert steps.unique().tolist() == ([0] if lower == 0 else [0, 1])
    assert rounded[~number].isnan().all()


@each_rounding
@pytest.mark.parametrize("lower", [1, 0x1234, 0x8000, 0xF000])
def test_random_rounding_has_no_bias(face: str, lower: int) -> None:
    """Up with probability lower / 65536: the count of ups is binomial, within four standard deviations of its mean."""
    count, share = 40000, lower / 65536
    one = torch.tensor([0x3F800000 + lower, -0x40800000 + lower], dtype=torch.int32, device=DEVICE).view(torch.float32)
    x = one.repeat(count // 2)
    ups = (at_random(face, x).float().abs() > x.abs()).sum().item()
    assert abs(ups - count * share) <= 4 * (count * share * (1 - share)) ** 0.5


@each_rounding
def test_random_rounding_depends_on_seed_step_and_place_and_on_nothing_else(face: str) -> None:
    x = random(1000)
    first = 2**33 + 5
    rounded = bits(at_random(face, x, first=first))
    assert torch.equal(rounded, bits(at_random(face, x, first=first)))
    assert torch.equal(rounded[300:700], bits(at_random(face, x[300:700], first=first + 300)))
    for other in ({"seed": 8}, {"seed": 7 + 2**40}, {"step": 2}, {"first": first + 1}, {"first": first - 2**32}):
        changed = bits(at_random(face, x, **{"first": first, **other})) != rounded
        # Two independent roundings of a uniform fraction differ with probability 1/3.
        assert 200 < changed.sum() < 470, other


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
@pytest.mark.parametrize("first", [0, 2**32 - 100, 2**40])
def test_the_kernel_rounds_with_the_bits_of_the_reference(seed: int, first: int) -> None:
    x = random(777, seed=3)
    ours, reference = (at_random(face, x, seed, first, step=2**31 + 1) for face in ("triton", "reference"))
    assert torch.equal(bits(ours), bits(reference))
