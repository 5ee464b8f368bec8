"""The linear layer in 8 bits: faces against exact products of the rounded operands, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.backend import Chip, observed_launches
from kernels.fp8_cast import E4M3, E5M2, fp8_round_reference, largest_reference
from kernels.fp8_linear import fp8_linear, has_fp8
from tests.kernels.faces import DEVICE, each_face
from tests.kernels.oracle import random

pytestmark = pytest.mark.skipif(not has_fp8(torch.device(DEVICE)), reason="needs a GPU with 8-bit products")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Tokens, in, out: one token; tokens that are no multiple of 16; several tiles.
SHAPES = [(1, 16, 32), (37, 48, 64), (130, 144, 272)]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight far smaller, and an upstream gradient far smaller still: each has a scale of its own."""
    tokens, width, out = shape
    x, weight = random(tokens, width, dtype=dtype), (random(out, width, seed=1) / 100).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), (1e-6 * random(tokens, out, seed=2)).to(dtype)


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """What is multiplied in the place of x, fp64."""
    return fp8_round_reference(x.detach(), largest_reference(x.detach()), kind).double()


def run(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    y = fp8_linear(x, weight)
    return y, *torch.autograd.grad(y, (x, weight), dy)


@each_face
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_the_exact_products_of_rounded_operands(
    shape: tuple[int, int, int], dtype: torch.dtype, face: str
) -> None:
    x, weight, dy = inputs(shape, dtype)
    x8, weight8, dy8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(dy, E5M2)
    exact = x8 @ weight8.t(), dy8 @ weight8, dy8.t() @ x8
    # Of what each sum adds up, which bounds the error of adding it up in fp32, whatever the order.
    sizes = x8.abs() @ weight8.t().abs(), dy8.abs() @ weight8.abs(), dy8.t().abs() @ x8.abs()
    terms = shape[1], shape[2], shape[0]
    place = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
    for ours, true, size, count in zip(run(x, weight, dy), exact, sizes, terms, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        # The tensor core's own sums, of all terms forward and of some of them backward, have 14 bits at the least.
        bits = 2**-13 if DEVICE == "cuda" else 2**-23
        assert ((ours.double() - true).abs() <= place * true.abs() + count * bits * size).all()


@each_face
def test_a_bias_is_added_and_has_its_gradient(face: str) -> None:
    x, weight, dy = inputs(SHAPES[1], torch.float32)
    bias = random(64, seed=3).requires_grad_()
    y = fp8_linear(x, weight, bias)
    assert torch.equal(y, fp8_linear(x, weight) + bias)
    assert torch.equal(torch.autograd.grad(y, bias, dy)[0], dy.sum(0))


@each_face
def test_no_gradient_is_computed_that_nobody_asks_for(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, dy = inputs(SHAPES[1], torch.float32)
    _, dx, dweight = run(x, weight, dy)
    for wanted, gradient in ((x, dx), (weight, dweight)):
        other = weight if wanted is x else x
        y = fp8_linear(*(t if t is wanted else t.detach() for t in (x, weight)))
        kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}  # type: ignore[union-attr]
        assert other.data_ptr() in kept and wanted.data_ptr() not in kept
        assert torch.equal(torch.autograd.grad(y, wanted, dy)[0], gradient)


@each_face
@DTYPES
def test_what_is_kept_is_what_came_and_the_largest_numbers(face: str, dtype: torch.dtype) -> None:
    x, weight, _ = inputs(SHAPES[1], dtype)
    kept = fp8_linear(x, weight).grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [t.data_ptr() for t in kept[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [t.numel() for t in kept[2:]] == [1, 1]


@each_face
@DTYPES
def test_runs_repeat_bitwise(face: str, dtype: torch.dtype) -> None:
    arguments = inputs(SHAPES[2], dtype)
    assert all(torch.equal(a, b) for a, b in zip(run(*arguments), run(*arguments), strict=True))


@each_face
def test_gradients_of_any_size_keep_their_digits(face: str) -> None:
    """Sizes that are powers of two change nothing but the size: scales follow."""
    x, weight, dy = inputs(SHAPES[1], torch.float32)
    _, dx, dweight = run(x, weight, dy)
    for power in (-60, 40):
        _, dx_there, dweight_there = run(x, weight, dy * 2.0**power)
        assert torch.equal(dx_there, dx * 2.0**power) and torch.equal(dweight_there, dweight * 2.0**power)


@each_face
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.filterwarnings("ignore:invalid")  # numpy's, under the interpreter
def test_what_is_not_finite_reaches_results_and_gradients(face: str, bad: float) -> None:
    x, weight, dy = inputs(SHAPES[1], torch.float32)
    with torch.no_grad():
        x[3, 5] = bad
    y, dx, dweight = run(x, weight, dy)
    assert y.isnan().all() and dweight.isnan().all() and dx.isfinite().all()
    x, weight, dy = inputs(SHAPES[1], torch.float32)
    dy[3, 5] = bad
    _, dx, dweight = run(x, weight, dy)
    assert dx.isnan().all() and dweight.isnan().all()


def test_faces_agree_where_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small whole numbers: every face must find the same, to the bit."""
    x, weight = (torch.randint(-3, 4, (40, 32), device=DEVICE).float().requires_grad_() for _ in range(2))
    dy = torch.randint(-2, 3, (40, 40), device=DEVICE).float()
    results = []
    weight = torch.cat((weight, weight))[:48].detach().requires_grad_()
    dy = torch.cat((dy, dy[:, :8]), dim=1)
    for face in ("torch", "triton", "reference"):
        monkeypatch.setattr(backend, "FACE", face)
        results.append(run(x, weight, dy))
    with torch.no_grad():
        expected = x @ weight.t(), dy @ weight, dy.t() @ x
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_no_tokens_give_no_rows_and_gradients_of_zeros() -> None:
    x, weight = random(0, 16).requires_grad_(), random(32, 16, seed=1).requires_grad_()
    y = fp8_linear(x, weight)
    assert y.shape == (0, 32)
    y.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_chips_older_than_ada_have_no_8_bit_products() -> None:
    assert has_fp8(torch.device("cpu"))
    for arch, expected in ((80, False), (86, False), (89, True), (90, True), (100, True)):
        with observed_launches(lambda *_: None, Chip(arch, 108)):
            assert has_fp8(torch.device("cuda")) is expected


@pytest.mark.parametrize(
    ("x", "weight", "bias", "why"),
    [
        ((5, 32), (16, 48), None, "do not fit"),
        ((5, 24), (16, 24), None, "multiples of 16"),
        ((5, 32), (24, 32), None, "multiples of 16"),
        ((5, 32), (16, 32), 32, "bias"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    x: tuple[int, ...], weight: tuple[int, ...], bias: int | None, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        fp8_linear(random(*x), random(*weight), None if bias is None else random(bias))


def test_dtypes_without_room_for_what_is_rounded_are_refused() -> None:
    with pytest.raises(ValueError, match="bf16 or both fp32"):
        fp8_linear(random(5, 32, dtype=torch.float16), random(16, 32, dtype=torch.float16))
