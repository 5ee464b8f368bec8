"""SwiGLU on a packed gate-up projection.

    y = silu(gate) * up,   silu(z) = z * sigmoid(z)                            (Shazeer 2020, GLU variants)

    dup   = dy * silu(gate)
    dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Only gate_up is kept: the backward computes the activation again. Traffic for T rows of F gates of b bytes: forward
3TFb, backward 5TFb. No number depends on another's row or column, so programs take tiles in any order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import accumulation_dtype, cdiv, launch, next_power_of_2, register_op, use_reference
from kernels.recipes import offer_recipe


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


@triton.jit
def _place(rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows and columns of this program's tile, and which of them exist."""
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    row = ((tl.program_id(0) // BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, column, (row < rows) & (column < COLUMNS)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_fwd_kernel(gate_up_ptr, y_ptr, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row, column, inside = _place(rows, COLUMNS, BLOCK, ROWS)
    gate_ptr = gate_up_ptr + row * (2 * COLUMNS) + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + COLUMNS, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * COLUMNS + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_bwd_kernel(
    dy_ptr, gate_up_ptr, dgate_up_ptr, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    row, column, inside = _place(rows, COLUMNS, BLOCK, ROWS)
    gate_place = row * (2 * COLUMNS) + column
    gate = tl.load(gate_up_ptr + gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_place + COLUMNS, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dgate_up_ptr + gate_place, dy * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
    tl.store(dgate_up_ptr + gate_place + COLUMNS, dy * silu, mask=inside)


@functools.cache
def _options(columns: int) -> dict[str, int]:
    """How both kernels are launched."""
    # 8 numbers a thread: of 16 bits one load of 16 bytes each of gate, up and dy. 128 threads with at most 40 registers
    # let 12 programs onto a multiprocessor, whose loads in flight, 48 KB and more, are enough to hide their latency.
    block = min(1024, next_power_of_2(columns))
    return {"COLUMNS": columns, "BLOCK": block, "ROWS": 1024 // block, "num_warps": 4}


def _grid(rows: int, options: dict[str, int]) -> tuple[int]:
    return (cdiv(rows, options["ROWS"]) * cdiv(options["COLUMNS"], options["BLOCK"]),)


def _swiglu_fwd_triton(gate_up: Tensor) -> Tensor:
    y = _fake_fwd(gate_up)
    if y.numel():
        options = _options(y.shape[-1])
        rows = y.numel() // y.shape[-1]
        launch(_swiglu_fwd_kernel, _grid(rows, options), gate_up.contiguous(), y, rows, **options)
    return y


def _swiglu_bwd_triton(dy: Tensor, gate_up: Tensor) -> Tensor:
    dgate_up = gate_up.new_empty(gate_up.shape)
    if dy.numel():
        options = _options(dy.shape[-1])
        rows = dy.numel() // dy.shape[-1]
        arguments = dy.contiguous(), gate_up.contiguous(), dgate_up, rows
        launch(_swiglu_bwd_kernel, _grid(rows, options), *arguments, **options)
    return dgate_up


def _swiglu_fwd(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.to(accumulation_dtype(gate.dtype))).mul_(up).to(gate_up.dtype)


def _swiglu_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    wide = accumulation_dtype(gate_up.dtype)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    grad = torch.empty(gate_up.shape, dtype=wide, device=gate_up.device)
    dgate, dup = grad.chunk(2, dim=-1)
    torch.mul(F.silu(gate), dy, out=dup)
    torch.ops.aten.silu_backward.grad_input(torch.mul(dy, up), gate, grad_input=dgate)
    return grad.to(gate_up.dtype)


def _fake_fwd(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_swiglu_bwd_op = register_op(
    "swiglu_bwd(Tensor dy, Tensor gate_up) -> Tensor",
    _swiglu_bwd,
    lambda dy, gate_up: gate_up.new_empty(gate_up.shape),
    triton=_swiglu_bwd_triton,
)
_swiglu_op = register_op(
    "swiglu(Tensor gate_up) -> Tensor",
    _swiglu_fwd,
    _fake_fwd,
    triton=_swiglu_fwd_triton,
    setup_context=_save,
    backward=lambda ctx, dy: _swiglu_bwd_op(dy, *ctx.saved_tensors),
)


def swiglu(gate_up: Tensor) -> Tensor:
    """Gated activation of a fused gate-up projection.

    Args:
        gate_up: [T, 2F]: the first half of the columns is the gate. Computed in fp32 (fp64 for fp64).
    Returns:
        [T, F], dtype of gate_up.
    Raises:
        ValueError: an odd number of columns.
    """
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)} must hold gate and up, so an even number of columns")
    if use_reference():
        return swiglu_reference(gate_up)
    y = _swiglu_op(gate_up)
    offer_recipe((y,), _swiglu_op, gate_up)
    return y
