"""The linear layer: the face against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from kernels.linear import linear, linear_reference, pack
from tests.kernels.oracle import assert_faithful, random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 67])
def test_linear_is_faithful(rows: int, dtype: torch.dtype) -> None:
    inputs = random(rows, 37, dtype=dtype), random(53, 37, seed=1, dtype=dtype), random(53, seed=2, dtype=dtype)
    assert_faithful(linear, linear_reference, inputs)
    assert_faithful(linear, linear_reference, inputs[:2])


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
