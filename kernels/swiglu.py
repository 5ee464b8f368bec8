"""SwiGLU on a packed gate-up projection.

    y = silu(gate) * up,   silu(z) = z * sigmoid(z)                            (Shazeer 2020, GLU variants)

    dup   = dy * silu(gate)
    dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Only gate_up is kept: the backward computes the activation again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import accumulation_dtype, register_op, use_reference


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


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
)
_swiglu_op = register_op(
    "swiglu(Tensor gate_up) -> Tensor",
    _swiglu_fwd,
    _fake_fwd,
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
    return _swiglu_op(gate_up)
