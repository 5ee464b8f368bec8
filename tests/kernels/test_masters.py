"""fp32 masters in two halves: the same master when joined, and in the weight the bf16 number nearest to it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.masters import join_halves, join_master, split_halves, split_master
from tests.kernels.faces import DEVICE

each_split = pytest.mark.parametrize("face", ["torch", "triton"])
BLOCK = 16384


@triton.jit
def _split_kernel(master_ptr, weight_ptr, remainder_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    weight, remainder = split_halves(tl.load(master_ptr + index, mask=inside))
    tl.store(weight_ptr + index, weight, mask=inside)
    tl.store(remainder_ptr + index, remainder, mask=inside)


@triton.jit
def _join_kernel(weight_ptr, remainder_ptr, master_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    master = join_halves(tl.load(weight_ptr + index, mask=inside), tl.load(remainder_ptr + index, mask=inside))
    tl.store(master_ptr + index, master, mask=inside)


def split(face: str, master: Tensor) -> tuple[Tensor, Tensor]:
    if face == "torch":
        return split_master(master)
    weight, remainder = (torch.empty(master.shape, dtype=torch.int16, device=DEVICE) for _ in range(2))
    _split_kernel[(triton.cdiv(len(master), BLOCK),)](master, weight, remainder, len(master), BLOCK=BLOCK)
    return weight.view(torch.bfloat16), remainder


def join(face: str, weight: Tensor, remainder: Tensor) -> Tensor:
    if face == "torch":
        return join_master(weight, remainder)
    master = torch.empty(weight.shape, device=DEVICE)
    grid = (triton.cdiv(len(weight), BLOCK),)
    _join_kernel[grid](weight.view(torch.int16), remainder, master, len(weight), BLOCK=BLOCK)
    return master


def masters() -> Tensor:
    """Every upper half with the lower halves where something turns, then random bits.

    Zeros, denormals, the largest numbers, infinities and NaN are among them, and halves between two weights whose
    lower one is even, and odd.
    """
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    upper = torch.arange(-(2**15), 2**15)
    chosen = ((upper << 16)[:, None] + lower).flatten()
    drawn = torch.randint(-(2**31), 2**31, (2**17 + 5,), generator=torch.Generator().manual_seed(1))
    return torch.cat([chosen, drawn]).to(torch.int32).to(DEVICE).view(torch.float32)


def numbers() -> Tensor:
    every = masters()
    return every[~every.isnan()]


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize])


def value(weight: Tensor) -> Tensor:
    """In float64; an infinity stands for the number that would follow the largest, as in any rounding of IEEE 754."""
    exact = weight.double()
    return torch.where(exact.isinf(), exact.sign() * 2.0**128, exact)


@each_split
def test_the_halves_joined_are_the_master_to_the_bit(face: str) -> None:
    master = numbers()
    weight, remainder = split(face, master)
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert torch.equal(bits(join(face, weight, remainder)), bits(master))


@each_split
def test_the_weight_is_the_nearer_neighbour_and_of_two_as_near_the_one_away_from_zero(face: str) -> None:
    master = numbers()
    master = master[master.isfinite()]
    towards_zero = (bits(master) >> 16).to(torch.int16)
    below, above = towards_zero.view(torch.bfloat16), (towards_zero + 1).view(torch.bfloat16)
    is_above = (value(above) - master.double()).abs() <= (value(below) - master.double()).abs()
    assert torch.equal(bits(split(face, master)[0]), bits(torch.where(is_above, above, below)))


@each_split
def test_the_weight_is_the_cast_but_where_a_half_lies_above_an_even_neighbour(face: str) -> None:
    master = numbers()
    differs = bits(split(face, master)[0]) != bits(master.bfloat16())
    is_half_above_even = (bits(master) & 0x1FFFF) == 0x8000
    assert torch.equal(differs, is_half_above_even & master.isfinite())
    assert differs.sum() >= 2**15 - 2**8


@each_split
def test_nan_stays_nan_in_the_weight_and_in_the_master(face: str) -> None:
    every = masters()
    nan = every[every.isnan()]
    assert len(nan) >= 2 * 6 * 127
    weight, remainder = split(face, nan)
    assert weight.isnan().all()
    assert (bits(join(face, weight, remainder)) == 0x7FC00000).all()


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 5, 7)], ids=str)
def test_halves_have_the_shape_of_the_master(shape: tuple[int, ...]) -> None:
    master = torch.randn(shape, device=DEVICE)
    weight, remainder = split_master(master)
    assert weight.shape == remainder.shape == shape
    assert torch.equal(join_master(weight, remainder), master)


def test_layouts_other_than_contiguous_are_read_right_and_results_are_contiguous() -> None:
    master = torch.randn(6, 10, device=DEVICE)
    weight, remainder = split_master(master)
    for view in (Tensor.t, lambda x: x[:, ::2], lambda x: x[:, :1].expand(6, 4)):
        of_view = split_master(view(master))
        joined = join_master(view(weight), view(remainder))
        assert torch.equal(of_view[0], view(weight)) and torch.equal(of_view[1], view(remainder))
        assert torch.equal(joined, view(master))
        assert all(x.is_contiguous() for x in (*of_view, joined))
