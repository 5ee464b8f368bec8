"""8-bit copies: each number's nearest in the format, by one scale a tensor, against all numbers of the format."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from kernels import fp8_cast as module
from kernels.fp8_cast import E4M3, E5M2, fp8_cast, fp8_round_reference, largest, largest_reference, scales_reference
from kernels.fp8_linear import has_fp8
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

pytestmark = pytest.mark.skipif(not has_fp8(torch.device(DEVICE)), reason="needs a GPU with 8-bit numbers")

# Every kernel here reads in fp32, so that the interpreter is right in bf16, too.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FORMATS = pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
# One row; rows and columns that fill no tile; several tiles each way; a row more than a tile.
SHAPES = [(1, 16), (37, 48), (16, 128), (129, 272), (300, 144)]


@functools.cache
def numbers(kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """All finite numbers of a format that are not negative, in order, with the codes that stand for them."""
    codes = torch.arange(128, dtype=torch.uint8)
    values = codes.view(kind).double()
    is_finite = values.isfinite()
    return values[is_finite], codes[is_finite]


def nearest(x: Tensor, kind: torch.dtype) -> Tensor:
    """Codes of the nearest numbers, by search; of two the one whose last bit is 0. x: fp64, finite."""
    values, codes = numbers(kind)
    above = torch.searchsorted(values, x.abs()).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    up, down = values[above] - x.abs(), x.abs() - values[below]
    is_above = (up < down) | ((up == down) & (codes[above] % 2 == 0))
    return codes[torch.where(is_above, above, below)] | (128 * torch.signbit(x)).to(torch.uint8)


def exact_scale(top: float, kind: torch.dtype) -> float:
    """The largest power of two that keeps the largest number within the format."""
    return 2.0 ** math.floor(math.log2(float(torch.finfo(kind).max) / top))


def wide(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of many sizes: some become the format's subnormal numbers, some 0."""
    sizes = torch.randint(-24, 6, shape, generator=torch.Generator().manual_seed(seed + 1)).to(DEVICE)
    return (random(*shape, seed=seed) * torch.exp2(sizes.float())).to(dtype)


def codes(copy: Tensor | None) -> Tensor:
    assert copy is not None
    return copy.cpu().view(torch.uint8)


def both(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns, inverse = fp8_cast(x, largest(x), kind, rows=True, columns=True)
    return codes(rows), codes(columns), inverse.cpu()


@FORMATS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copies_are_the_nearest_numbers_and_so_is_the_transposed_one(
    shape: tuple[int, int], dtype: torch.dtype, kind: torch.dtype
) -> None:
    x = wide(*shape, dtype=dtype)
    exact = x.double().cpu()
    scale = exact_scale(exact.abs().max().item(), kind)
    expected = nearest(exact * scale, kind)
    rows, columns, inverse = both(x, kind)
    assert torch.equal(rows, expected)
    assert torch.equal(columns[:, : shape[0]], expected.t())
    assert columns.shape[1] == -(-shape[0] // 16) * 16 and not columns[:, shape[0] :].any()
    assert inverse.item() == 1 / scale


@FORMATS
def test_every_number_every_tie_and_what_lies_beside_a_tie_is_rounded_right(kind: torch.dtype) -> None:
    """Between 0 and the largest; the largest itself makes the scale 1."""
    values, _ = numbers(kind)
    ties = (values[1:] + values[:-1]) / 2
    exact = torch.cat((values, ties, ties * (1 + 2**-18), ties * (1 - 2**-18)))
    exact = torch.cat((exact, -exact))
    x = torch.zeros(-(-len(exact) // 16) * 16, dtype=torch.float64)
    x[: len(exact)] = exact
    x = x.view(-1, 16)
    assert torch.equal(x.float().double(), x)
    expected = nearest(x, kind)
    rows, _, inverse = both(x.float().to(DEVICE), kind)
    assert torch.equal(rows, expected) and inverse == 1
    of_reference = fp8_round_reference(x.float(), largest_reference(x.float()), kind)
    assert torch.equal(of_reference.to(kind).view(torch.uint8), expected)


@FORMATS
def test_the_largest_number_chooses_the_scale_and_never_overflows(kind: torch.dtype) -> None:
    most = float(torch.finfo(kind).max)
    tops = [most, math.nextafter(most, math.inf), most * (1 + 2**-23), 1.0, 1.75, 1.75 * (1 + 2**-23), 3e38, 1e-20]
    for top in tops:
        x = torch.full((1, 16), top, device=DEVICE)
        top = x[0, 0].double().item()  # in fp32
        scale, inverse = (value.item() for value in scales_reference(largest(x).cpu(), kind))
        assert scale == exact_scale(top, kind) and inverse == 1 / scale
        copy, _, unit = fp8_cast(x, largest(x), kind, rows=True)
        assert copy is not None and unit.item() == inverse
        size = copy[0, 0].double().item()
        assert most / 2 <= size <= most


@FORMATS
def test_zeros_stay_zeros_and_what_is_smaller_than_any_scale_becomes_zero(kind: torch.dtype) -> None:
    for top in (0.0, 1e-45, 1e-42):
        rows, columns, inverse = both(torch.full((3, 16), top, device=DEVICE), kind)
        assert not rows.any() and not columns.any()
        assert 0 < inverse.item() < math.inf
    signed = torch.tensor([[0.0, -0.0] * 8], device=DEVICE)
    assert both(signed, kind)[0].tolist() == [[0, 128] * 8]


@FORMATS
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.filterwarnings("ignore:invalid")  # numpy's, under the interpreter
def test_an_infinity_or_nan_makes_all_of_the_copy_nan(bad: float, kind: torch.dtype) -> None:
    x = random(40, 32)
    x[33, 7] = bad
    rows, columns, inverse = fp8_cast(x, largest(x), kind, rows=True, columns=True)
    assert rows is not None and columns is not None
    assert rows.float().isnan().all() and columns[:, :40].float().isnan().all() and inverse.isnan()
    assert fp8_round_reference(x, largest_reference(x), kind).isnan().all()


@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, (200, 64)], ids=str)  # and more numbers than one program looks through
def test_the_largest_is_exact(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NUMBERS", 1024)
    for seed, sign in ((0, 1), (1, -1)):
        x = random(*shape, seed=seed, dtype=dtype)
        x[-1, -1] = 9 * sign
        assert largest(x).item() == 9
        x[-1, -1] = 0
        assert largest(x).item() == x.abs().max().item() == largest_reference(x).item()


@FORMATS
@DTYPES
def test_the_reference_stands_for_the_same_numbers(dtype: torch.dtype, kind: torch.dtype) -> None:
    x = wide(70, 96, dtype=dtype)
    rows, _, inverse = fp8_cast(x, largest(x), kind, rows=True)
    assert rows is not None
    stands_for = rows.double() * inverse.double()
    reference = fp8_round_reference(x, largest_reference(x), kind)
    assert reference.dtype == dtype and torch.equal(reference.double(), stands_for)


def test_inputs_that_lie_in_any_order_are_read_right() -> None:
    x = random(48, 37).t()
    for ours, expected in zip(both(x, E4M3), both(x.contiguous(), E4M3), strict=True):
        assert torch.equal(ours, expected)


def test_one_copy_alone_is_bitwise_what_it_is_beside_the_other() -> None:
    x = wide(130, 144, dtype=torch.float32)
    rows, columns, inverse = both(x, E5M2)
    alone, none, unit = fp8_cast(x, largest(x), E5M2, rows=True)
    assert none is None and torch.equal(codes(alone), rows) and unit.item() == inverse
    none, alone, unit = fp8_cast(x, largest(x), E5M2, columns=True)
    assert none is None and torch.equal(codes(alone), columns) and unit.item() == inverse
