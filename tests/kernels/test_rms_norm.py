"""RMSNorm, alone and after the residual add: faces against references, and rows that mind their own business."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kernels import backend
from kernels import rms_norm as module
from kernels.backend import observed_launches
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tests.kernels.faces import DEVICE, each_face, faces, triton_face
from tests.kernels.oracle import assert_faithful, random

# One number; an odd width; several tiles of rows; no rows; around a power of two.
SHAPES = [(1, 1), (1, 2), (7, 37), (130, 256), (0, 16), (9, 1023), (2, 1024), (3, 1025)]
# A power of two and a tail, which the backward takes apart in 16 bits; rows that it takes in pieces, two or three.
SHAPES += [(3, 4100), (7, 5120), (5, 8200)]
EPS = 1e-5

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@faces
@shapes
def test_rms_norm_is_faithful(shape: tuple[int, int], face: str, dtype: torch.dtype) -> None:
    inputs = random(*shape, dtype=dtype), random(shape[1], seed=1, dtype=dtype)
    cancels = shape[1] == 1  # y is 1 or -1 whatever x, and dx nearly nothing
    assert_faithful(partial(rms_norm, eps=EPS), partial(rms_norm_reference, eps=EPS), inputs, cancels=cancels)


@faces
@shapes
def test_add_rms_norm_is_faithful(shape: tuple[int, int], face: str, dtype: torch.dtype) -> None:
    inputs = random(*shape, dtype=dtype), random(*shape, seed=2, dtype=dtype), random(shape[1], seed=1, dtype=dtype)
    assert_faithful(partial(add_rms_norm, eps=EPS), partial(add_rms_norm_reference, eps=EPS), inputs)


@faces
@pytest.mark.parametrize("heads", [slice(0, 5), slice(2, 7), slice(6, 7)], ids=["first", "last", "one"])
def test_norms_of_heads_take_them_out_of_a_wider_projection(heads: slice, face: str, dtype: torch.dtype) -> None:
    """Queries and keys are slices of the fused projection, and are not copied out of it first."""
    weight = random(24, seed=1, dtype=dtype)

    def of_slice(op):
        return lambda projection, weight: op(projection[:, heads], weight, EPS)

    assert_faithful(of_slice(rms_norm), of_slice(rms_norm_reference), (random(41, 7, 24, dtype=dtype), weight))


@each_face
def test_inputs_that_lie_in_any_order_are_read_right(face: str) -> None:
    x, dy = random(48, 20).t(), random(48, 20, seed=1).t()  # [20, 48], columns first
    weight = random(96, seed=2)[::2]
    residual = random(1, 48, seed=3).expand(20, 48)

    def run(x: Tensor, weight: Tensor, residual: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.requires_grad_() for tensor in (x.detach(), residual.detach(), weight.detach())]
        y, total = add_rms_norm(*leaves, EPS)
        z = rms_norm(leaves[0], leaves[2], EPS)
        return y, total, z, *torch.autograd.grad([y, total, z], leaves, [dy, dy, dy])

    strided = run(x, weight, residual, dy)
    packed = run(x.contiguous(), weight.contiguous(), residual.contiguous(), dy.contiguous())
    for a, b in zip(strided, packed, strict=True):
        # What torch computes in another order may differ in the last places.
        assert torch.equal(a, b) if face == "triton" else torch.allclose(a, b, rtol=0, atol=1e-6 * b.abs().max().item())


def grads(dtype: torch.dtype, total: int, rows: slice, weight: Tensor) -> tuple[Tensor, ...]:
    """Results and dx of some rows of so many."""
    x, residual, dy, dsum = (random(total, len(weight), seed=seed, dtype=dtype)[rows] for seed in range(4))
    x, residual = x.requires_grad_(), residual.requires_grad_()
    y, added = add_rms_norm(x, residual, weight, EPS)
    z = rms_norm(x, weight, EPS)
    dx = torch.autograd.grad([y, added], [x, residual], [dy, dsum])
    return y, added, z, *dx, *torch.autograd.grad(z, [x], dy)


@faces
@pytest.mark.parametrize(("total", "columns"), [(70, 24), (40, 128), (10, 5120)])
def test_a_row_alone_and_among_others_is_bitwise_the_same(
    total: int, columns: int, face: str, dtype: torch.dtype
) -> None:
    weight = random(columns, seed=9, dtype=dtype)
    together = grads(dtype, total, slice(0, total), weight)
    for rows in (slice(3, 4), slice(total // 2, total)):
        alone = grads(dtype, total, rows, weight)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


@faces
@pytest.mark.parametrize("columns", [128, 1025, 4096, 5120])
def test_the_norm_after_a_sum_is_bitwise_the_norm_of_that_sum(columns: int, face: str, dtype: torch.dtype) -> None:
    """Recomputation runs the one for the other."""
    weight = random(columns, seed=9, dtype=dtype)
    y, added = add_rms_norm(*(random(5, columns, seed=seed, dtype=dtype) for seed in range(2)), weight, EPS)
    assert torch.equal(y, rms_norm(added, weight, EPS))


@faces
def test_a_run_repeats_bitwise(face: str, dtype: torch.dtype) -> None:
    weight = random(256, seed=9, dtype=dtype).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        y = rms_norm(random(130, 256, dtype=dtype), weight, EPS)
        return y, *torch.autograd.grad(y, weight, random(130, 256, seed=1, dtype=dtype))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@each_face
def test_gradients_that_did_not_arrive_count_as_zero(face: str) -> None:
    x, residual = (random(5, 24, seed=seed).requires_grad_() for seed in range(2))
    weight, upstream = random(24, seed=2).requires_grad_(), random(5, 24, seed=3)
    leaves = x, residual, weight
    for used, reach in ((0, leaves), (1, leaves[:2])):
        results = [op(*leaves, EPS)[used] for op in (add_rms_norm, add_rms_norm_reference)]
        ours, plain = (torch.autograd.grad(result, reach, upstream) for result in results)
        for a, b in zip(ours, plain, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@each_face
def test_tiny_rows_are_ruled_by_epsilon(face: str) -> None:
    x = torch.full((1, 8), 1e-12, device=DEVICE)
    assert torch.allclose(rms_norm(x, torch.ones(8, device=DEVICE), 1e-6), x / 1e-6**0.5, rtol=1e-6, atol=0)


@each_face
def test_large_rows_in_fp16_do_not_overflow(face: str) -> None:
    x = torch.full((2, 64), 6e4, dtype=torch.float16, device=DEVICE)
    assert torch.equal(rms_norm(x, torch.ones_like(x[0]), 1e-6), torch.ones_like(x))


def launches(rows: int, columns: int, dtype: torch.dtype, chip: backend.Chip) -> list[tuple[str, int, dict[str, int]]]:
    """(kernel, number of programs, options) of a forward and a backward pass."""
    found: list[tuple[str, int, dict[str, int]]] = []

    def observe(kernel, grid, args, options) -> None:
        found.append((kernel.__name__, grid[0], options))

    x, weight = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((rows, columns), (columns,)))
    with observed_launches(observe, chip):
        y, total = add_rms_norm(x.requires_grad_(), x, weight.requires_grad_(), EPS)
        torch.autograd.backward([y, total], [torch.empty_like(y), torch.empty_like(y)])
    return found


CHIPS = {80: backend.Chip(80, 108), 90: backend.Chip(90, 132)}


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("columns", [64, 96, 1000, 4096, 5120, 8192, 12288, 16384])
def test_options_are_a_matter_of_the_width_and_not_of_the_rows(columns: int, arch: int) -> None:
    options = [[entry[2] for entry in launches(rows, columns, torch.bfloat16, CHIPS[arch])] for rows in (1, 7, 65536)]
    assert options[0] == options[1] == options[2]


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [128, 2560, 4096, 5120, 8192, 16384])
def test_programs_of_the_backward_all_run_at_once_and_keep_enough_on_its_way(
    columns: int, dtype: torch.dtype, arch: int
) -> None:
    chip, rows = CHIPS[arch], 65536
    [(_, programs, options)] = [x for x in launches(rows, columns, dtype, chip) if x[0] == "_rms_norm_bwd_kernel"]
    each = -(-programs // chip.multiprocessors)
    assert each * 32 * options["num_warps"] * options["maxnreg"] <= 65536
    stream = options["ROWS"] * (options["BLOCK"] + options["TAIL"]) * dtype.itemsize
    others = (options["PIECES"] - 1) * options["BLOCK"] * dtype.itemsize
    tile = 3 * stream + 3 * others  # x, dy, dsum; of other pieces x, dy, weight
    ahead = options["STAGES"] - 1
    assert each * ahead * tile <= module.SHARED_MEMORY[arch]
    if dtype == torch.bfloat16:
        assert each * ahead * (3 * stream + 2 * others) >= 32 * 1024
        traffic = 4 * 8192 * columns * 2  # of a pack of 8192 tokens, or of as many heads
        assert 2 * 4 * programs // options["PIECES"] * columns <= 0.04 * traffic


def test_the_references_pass_gradcheck_and_so_do_the_faces() -> None:
    x, residual = (random(5, 6, seed=i, dtype=torch.float64).requires_grad_() for i in range(2))
    weight = random(6, seed=3, dtype=torch.float64).requires_grad_()
    for op in (rms_norm, rms_norm_reference):
        assert gradcheck(partial(op, eps=EPS), (x, weight))
    for op in (add_rms_norm, add_rms_norm_reference):
        assert gradcheck(partial(op, eps=EPS), (x, residual, weight))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(random(3, 4), random(5), EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(random(3, 4), random(4, 4), random(4), EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(random(3, 4), random(3, 4, dtype=torch.float16), random(4), EPS)


@triton_face
def test_rows_too_wide_for_the_kernel_are_refused(face: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="16384"):
        rms_norm(random(1, 16385, dtype=dtype), random(16385, dtype=dtype), EPS)
