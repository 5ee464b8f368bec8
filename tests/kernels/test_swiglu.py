"""SwiGLU: faces against the reference, and numbers that mind their own business."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.faces import DEVICE, each_face, faces
from tests.kernels.oracle import assert_faithful, random

# T, 2F: one gate; an odd F; several tiles of rows; no rows; around the 1024 gates of a tile, and several tiles a row.
SHAPES = [(1, 2), (5, 74), (70, 128), (0, 8), (3, 2046), (2, 2048), (3, 2050), (5, 2 * 2749)]


@faces
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_is_faithful(shape: tuple[int, int], face: str, dtype: torch.dtype) -> None:
    assert_faithful(swiglu, swiglu_reference, [3 * random(*shape, dtype=dtype)])


@faces
def test_rows_may_have_any_number_of_dimensions(face: str, dtype: torch.dtype) -> None:
    assert_faithful(swiglu, swiglu_reference, [random(2, 3, 74, dtype=dtype)])
    assert_faithful(swiglu, swiglu_reference, [random(74, dtype=dtype)])


@faces
@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, under the interpreter
def test_large_gates_saturate_and_nothing_overflows(face: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-3e4, -200.0, -120.0, 0.0, 120.0, 3e4], device=DEVICE)
    gate_up = torch.cat((gate, torch.ones_like(gate))).to(dtype).unsqueeze(0).requires_grad_()
    y = swiglu(gate_up)
    expected = gate.clamp(min=0).to(dtype)
    assert torch.equal(y[0], expected)
    (grad,) = torch.autograd.grad(y, gate_up, torch.ones_like(y))
    slope = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0], dtype=dtype, device=DEVICE)
    assert torch.allclose(grad[0], torch.cat((slope, expected)), rtol=0, atol=1e-30)


@each_face
def test_inputs_that_lie_in_any_order_are_read_right(face: str) -> None:
    gate_up, dy = random(74, 9).t(), random(37, 9, seed=1).t()

    def run(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaf = gate_up.detach().requires_grad_()
        y = swiglu(leaf)
        return y, *torch.autograd.grad(y, leaf, dy)

    for a, b in zip(run(gate_up, dy), run(gate_up.contiguous(), dy.contiguous()), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@faces
@pytest.mark.parametrize("columns", [74, 2050])
def test_a_row_alone_and_among_others_is_bitwise_the_same(columns: int, face: str, dtype: torch.dtype) -> None:
    def run(rows: slice) -> tuple[Tensor, ...]:
        gate_up = random(40, columns, dtype=dtype)[rows].requires_grad_()
        y = swiglu(gate_up)
        return y, *torch.autograd.grad(y, gate_up, random(40, columns // 2, seed=1, dtype=dtype)[rows])

    together = run(slice(0, 40))
    for rows in (slice(13, 14), slice(13, 40)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), together, strict=True))


def test_the_reference_passes_gradcheck_and_so_does_the_face() -> None:
    gate_up = random(5, 6, dtype=torch.float64).requires_grad_()
    assert gradcheck(swiglu, (gate_up,)) and gradcheck(swiglu_reference, (gate_up,))


def test_an_odd_number_of_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        swiglu(random(3, 5))
