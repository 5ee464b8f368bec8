"""The linear layer: the face against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from kernels import linear as module
from kernels.linear import linear, linear_reference, matmul_nt, multiply, pack
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import assert_faithful, random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 67])
def test_linear_is_faithful(rows: int, dtype: torch.dtype) -> None:
    inputs = random(rows, 37, dtype=dtype), random(53, 37, seed=1, dtype=dtype), random(53, seed=2, dtype=dtype)
    assert_faithful(linear, linear_reference, inputs)
    assert_faithful(linear, linear_reference, inputs[:2])


@pytest.mark.skipif(module._onednn is None, reason="PyTorch without oneDNN")
@pytest.mark.parametrize(("rows", "columns"), [(1376, 64), (64, 1376)])
def test_of_two_transposed_operands_the_narrow_one_is_copied(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN copies the first one, by one thread, as where a weight's gradient is formed of dy and x."""
    a, b = random(512, rows).t(), random(512, columns, seed=1).t()
    first: list[int] = []

    def look(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        first.append(len(x))
        return product(x, *rest)

    product = module._onednn
    monkeypatch.setattr(module, "_onednn", look)
    found = matmul_nt(a, b)
    assert first == [min(rows, columns)]
    exact, size = a.double() @ b.double().t(), a.abs().double() @ b.abs().double().t()
    assert found.shape == exact.shape and found.is_contiguous()
    assert ((found - exact).abs() <= 512 * 2**-24 * size).all()


def test_a_frozen_weight_gets_no_gradient_and_costs_none() -> None:
    x = random(4, 8).requires_grad_()
    weight = random(6, 8, seed=1)
    linear(x, weight).sum().backward()
    assert weight.grad is None and x.grad is not None
    assert torch.allclose(x.grad, weight.sum(dim=0).expand(4, 8))


def test_the_face_passes_gradcheck() -> None:
    x, weight, bias = (
        random(*shape, seed=seed, dtype=torch.float64).requires_grad_()
        for seed, shape in enumerate([(5, 6), (4, 6), (4,)])
    )
    assert gradcheck(linear, (x, weight))
    assert gradcheck(linear, (x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_summed_and_kept_in_fp32(dtype: torch.dtype) -> None:
    a, b = random(5, 300, dtype=dtype), random(7, 300, seed=1, dtype=dtype)
    exact = a.double() @ b.double().t()
    total = torch.empty(5, 7, device=DEVICE)
    multiply(a, b.t(), out=total)
    assert (total - exact).abs().max() < 1e-4
    multiply(a, b.t(), out=total, add=True)
    assert (total - 2 * exact).abs().max() < 2e-4
    narrow = torch.empty(5, 7, dtype=dtype, device=DEVICE)
    multiply(a, b.t(), out=narrow)
    assert (narrow - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps + 1e-4


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        linear(random(3, 4), random(5, 3))
    with pytest.raises(ValueError, match="bias"):
        linear(random(3, 4), random(5, 4), random(4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a layout for processors")
@pytest.mark.parametrize("rows", [1, 2, 16, 65])
def test_a_packed_weight_multiplies_like_the_plain_one(rows: int) -> None:
    weight, bias = random(37, 24), random(37, seed=1)
    x = random(rows, 24, seed=2)
    packed = pack(weight)
    assert packed.is_mkldnn and packed.shape == weight.shape and pack(packed) is packed
    expected = x.double() @ weight.double().t() + bias.double()
    assert (linear(x, packed, bias) - expected).abs().max() <= 1e-5


def test_a_weight_that_has_no_other_layout_stays_as_it_is() -> None:
    weight = random(8, 8).double()
    assert pack(weight) is weight
