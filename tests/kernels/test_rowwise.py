"""RMSNorm, rotary, SwiGLU, and the linear layer: faces against references, and rows that mind their own business."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from kernels.linear import linear, linear_reference
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rotary import rotary, rotary_reference
from kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.faces import faces
from tests.kernels.oracle import assert_faithful, random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS_AND_COLUMNS = ((1, 2), (1, 64), (7, 37), (130, 256), (0, 16), (33, 1023))
EPS = 1e-5

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize("shape", ROWS_AND_COLUMNS, ids=str)


def rope_arguments(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """positions, cos, sin: positions restart, as in a pack."""
    angles = random(tokens + 5, width // 2, seed=9)
    return torch.arange(tokens) % max(1, tokens // 2), angles.cos(), angles.sin()


@faces
@shapes
def test_rms_norm_is_faithful(shape: tuple[int, int], face: str, dtype: torch.dtype) -> None:
    inputs = random(*shape, dtype=dtype), random(shape[1], seed=1, dtype=dtype)
    assert_faithful(partial(rms_norm, eps=EPS), partial(rms_norm_reference, eps=EPS), inputs)


@faces
@shapes
def test_add_rms_norm_is_faithful(shape: tuple[int, int], face: str, dtype: torch.dtype) -> None:
    inputs = random(*shape, dtype=dtype), random(*shape, seed=2, dtype=dtype), random(shape[1], seed=1, dtype=dtype)
    assert_faithful(partial(add_rms_norm, eps=EPS), partial(add_rms_norm_reference, eps=EPS), inputs)


def test_rms_norm_takes_heads_out_of_a_wider_projection() -> None:
    projection = random(9, 7, 16)
    weight = random(16, seed=1)
    heads = projection[:, 2:5]  # not contiguous, as when queries are split from a fused projection
    assert torch.equal(rms_norm(heads, weight, EPS), rms_norm(heads.contiguous(), weight, EPS))


def test_rms_norm_of_tiny_rows_is_ruled_by_epsilon() -> None:
    x = torch.full((1, 8), 1e-12)
    assert torch.allclose(rms_norm(x, torch.ones(8), 1e-6), x / 1e-6**0.5, rtol=1e-6, atol=0)


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 2), (4, 2, 32), (3, 1, 80)])
def test_rotary_is_faithful(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    inputs = random(11, heads, width, dtype=dtype), random(11, kv_heads, width, seed=1, dtype=dtype)
    positions, cos, sin = rope_arguments(11, width)
    keywords = {"positions": positions, "cos": cos, "sin": sin}
    assert_faithful(partial(rotary, **keywords), partial(rotary_reference, **keywords), inputs)


def test_rotary_turns_each_pair_by_the_angle_of_its_position() -> None:
    angle = torch.tensor([[0.0], [0.3]])
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    turned, _ = rotary(q, q, torch.tensor([1, 1]), angle.cos(), angle.sin())
    expected = torch.tensor([[[0.3, 0.3]], [[0.3, 0.3]]])
    expected = torch.stack((torch.cos(expected[:, :, 0]), torch.sin(expected[:, :, 0])), dim=-1)
    expected[1] = torch.stack((-torch.sin(torch.tensor(0.3)), torch.cos(torch.tensor(0.3))))
    assert torch.allclose(turned, expected)


@dtypes
@pytest.mark.parametrize("shape", [(1, 2), (5, 74), (64, 512), (0, 8)], ids=str)
def test_swiglu_is_faithful(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_faithful(swiglu, swiglu_reference, [3 * random(*shape, dtype=dtype)])


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 67])
def test_linear_is_faithful(rows: int, dtype: torch.dtype) -> None:
    inputs = random(rows, 37, dtype=dtype), random(53, 37, seed=1, dtype=dtype), random(53, seed=2, dtype=dtype)
    assert_faithful(linear, linear_reference, inputs)
    assert_faithful(linear, linear_reference, inputs[:2])


def test_a_frozen_weight_gets_no_gradient_and_costs_none() -> None:
    x = random(4, 8).requires_grad_()
    weight = random(6, 8, seed=1)
    linear(x, weight).sum().backward()
    assert weight.grad is None
    assert torch.allclose(x.grad, weight.sum(dim=0).expand(4, 8))


def test_faces_pass_gradcheck() -> None:
    x, residual = (random(5, 6, seed=i, dtype=torch.float64).requires_grad_() for i in range(2))
    weight = random(6, seed=3, dtype=torch.float64).requires_grad_()
    matrix = random(4, 6, seed=4, dtype=torch.float64).requires_grad_()
    q = random(5, 2, 6, seed=5, dtype=torch.float64).requires_grad_()
    positions, cos, sin = rope_arguments(5, 6)
    assert gradcheck(partial(rms_norm, eps=EPS), (x, weight))
    assert gradcheck(partial(add_rms_norm, eps=EPS), (x, residual, weight))
    assert gradcheck(swiglu, (x,))
    assert gradcheck(linear, (x, matrix))
    assert gradcheck(lambda q: rotary(q, q, positions, cos, sin), (q,))


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "swiglu", "rotary"])
def test_a_row_alone_and_among_others_is_bitwise_the_same(op: str) -> None:
    x, residual = random(40, 64), random(40, 64, seed=2)
    weight = random(64, seed=1)
    positions, cos, sin = rope_arguments(40, 16)

    def run(rows: slice) -> torch.Tensor:
        if op == "rms_norm":
            return rms_norm(x[rows], weight, EPS)
        if op == "add_rms_norm":
            return add_rms_norm(x[rows], residual[rows], weight, EPS)[0]
        if op == "swiglu":
            return swiglu(x[rows])
        heads = x[rows].unflatten(1, (4, 16))
        return rotary(heads, heads, positions[rows], cos, sin)[0]

    assert torch.equal(run(slice(0, 40))[13:29], run(slice(13, 29)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(random(3, 4), random(5), EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(random(3, 4), random(4, 4), random(4), EPS)
    with pytest.raises(ValueError, match="even"):
        swiglu(random(3, 5))
    with pytest.raises(ValueError, match="weight"):
        linear(random(3, 4), random(5, 3))
    with pytest.raises(ValueError, match="bias"):
        linear(random(3, 4), random(5, 4), random(4))
    q = random(3, 2, 4)
    with pytest.raises(ValueError, match="do not fit"):
        rotary(q, q[:2], torch.arange(3), random(3, 2), random(3, 2))
    with pytest.raises(ValueError, match="tables"):
        rotary(q, q, torch.arange(3), random(3, 4), random(3, 4))
