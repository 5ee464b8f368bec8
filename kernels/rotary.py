"""Rotary position embedding of queries and keys, half rotation.

    (a, b) -> (a cos - b sin, b cos + a sin)                                   (Su et al. 2021, RoFormer, eq. 34)

where a and b are the first and the second half of a head, and the angle of entry i at position p is
p * inv_freq[i]. A rotation's transpose is the rotation by the opposite angle, so the backward is the same kernel
with the sign of the sine turned.

`rotary` takes queries and keys. `split_rotary` takes the fused product of the three projections and lays out what
attention reads: queries and keys turned, values copied, each on its own, so that the product need not be kept; its
backward writes the product's gradient whole, where autograd would join three.

Traffic for T tokens of n heads of h numbers of b bytes: 2Tnhb either way, and 8Th for cosines and sines, which the
caches keep for all heads of a token.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import accumulation_dtype, cdiv, launch, next_power_of_2, register_op, use_reference
from kernels.recipes import offer_recipe


def rotary_reference(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [T, 1, h/2]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.to(accumulation_dtype(x.dtype)).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def split_rotary_reference(
    qkv: Tensor, heads: int, kv_heads: int, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    return *rotary_reference(q, k, positions, cos, sin), v


@triton.jit
def _turn(
    x_ptr,
    y_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    tile,
    tokens,
    x_stride,
    y_stride,
    X_FIRST: tl.constexpr,
    Y_FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """A tile of the heads that begin at X_FIRST. SIGN is that of the angle; 0 copies. Without an x, y is zero."""
    HALF: tl.constexpr = WIDTH // 2
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // HEADS, row % HEADS
    column = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (column < HALF)
    if x_ptr is None:
        a = tl.zeros((ROWS, BLOCK), tl.float32)
        b = a
    else:
        x_row = x_ptr + (token * x_stride + (X_FIRST + head) * WIDTH)
        a = tl.load(x_row + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_row + HALF + column, mask=inside, other=0.0).to(tl.float32)
        if SIGN != 0:
            position = tl.load(positions_ptr + token, mask=token < tokens, other=0).to(tl.int64)
            cos = tl.load(cos_ptr + position * HALF + column, mask=inside, other=0.0)
            sin = tl.load(sin_ptr + position * HALF + column, mask=inside, other=0.0) * SIGN
            a, b = a * cos - b * sin, b * cos + a * sin
    y_row = y_ptr + (token * y_stride + (Y_FIRST + head) * WIDTH)
    tl.store(y_row + column, a, mask=inside)
    tl.store(y_row + HALF + column, b, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _rotary_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    q_stride,
    k_stride,
    v_stride,
    q_out_stride,
    k_out_stride,
    v_out_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FROM_JOINED: tl.constexpr,
    TO_JOINED: tl.constexpr,
    SIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """First the programs of q's tiles, then those of k's, then v's. Strides are from token to token.

    FROM_JOINED: q, k, v are one tensor, where the heads of k follow those of q, and v's k's. TO_JOINED: so are results.
    """
    K_IN: tl.constexpr = HEADS if FROM_JOINED else 0
    V_IN: tl.constexpr = HEADS + KV_HEADS if FROM_JOINED else 0
    K_OUT: tl.constexpr = HEADS if TO_JOINED else 0
    V_OUT: tl.constexpr = HEADS + KV_HEADS if TO_JOINED else 0
    tile = tl.program_id(0).to(tl.int64)
    k_tile = tile - tl.cdiv(tokens.to(tl.int64) * HEADS, ROWS)
    v_tile = k_tile - tl.cdiv(tokens.to(tl.int64) * KV_HEADS, ROWS)
    tables = positions_ptr, cos_ptr, sin_ptr
    if k_tile < 0:
        strides = q_stride, q_out_stride
        _turn(q_ptr, q_out_ptr, *tables, tile, tokens, *strides, 0, 0, HEADS, WIDTH, BLOCK, ROWS, SIGN)
    elif v_tile < 0:
        strides = k_stride, k_out_stride
        _turn(k_ptr, k_out_ptr, *tables, k_tile, tokens, *strides, K_IN, K_OUT, KV_HEADS, WIDTH, BLOCK, ROWS, SIGN)
    elif v_out_ptr is not None:
        strides = v_stride, v_out_stride
        _turn(v_ptr, v_out_ptr, *tables, v_tile, tokens, *strides, V_IN, V_OUT, KV_HEADS, WIDTH, BLOCK, ROWS, 0)


@functools.cache
def _options(width: int) -> dict[str, int]:
    """How the kernel is launched."""
    # 8 pairs a thread: of 16 bits one load of 16 bytes from either half. A program waits twice, for its positions and
    # then for heads and tables, some 2 microseconds in all, and moves 8 KB: to use 4.3 TB/s / 132 a multiprocessor must
    # hold 8. With 128 threads and at most 48 registers it holds ten.
    block = next_power_of_2(width // 2)
    return {"WIDTH": width, "BLOCK": block, "ROWS": max(1, 1024 // block), "num_warps": 4}


def _by_token(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x, and its stride from token to token; copied where a token's heads do not lie side by side."""
    if x is None:
        return None, 0
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = x.contiguous()
    return x, x.stride(0)


def _launch(
    sources: tuple[Tensor | None, ...] | Tensor,
    targets: tuple[Tensor | None, ...] | Tensor,
    heads: int,
    kv_heads: int,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    conjugate: bool,
) -> None:
    """Turn queries and keys, and copy values where there is a target for them; zeros where there is no source.

    Args:
        sources, targets: of q, k, v; one tensor where they are joined.
    """
    constants: dict[str, Any] = {"FROM_JOINED": isinstance(sources, Tensor), "TO_JOINED": isinstance(targets, Tensor)}
    if isinstance(sources, Tensor):
        laid = (_by_token(sources),) * 3
    else:
        q, k, v = sources
        laid = _by_token(q), _by_token(k), _by_token(v)
    outs = (targets,) * 3 if isinstance(targets, Tensor) else targets
    assert outs[0] is not None
    (tokens, _, width), kv_tensors = outs[0].shape, 1 if outs[2] is None else 2
    options = _options(width)
    tiles = cdiv(tokens * heads, options["ROWS"]) + kv_tensors * cdiv(tokens * kv_heads, options["ROWS"])
    (q, q_stride), (k, k_stride), (v, v_stride) = laid
    strides = q_stride, k_stride, v_stride, *[0 if x is None else x.stride(0) for x in outs]
    tables = positions.contiguous(), cos.contiguous(), sin.contiguous()
    # Without a head of keys there are no programs for them, but the kernel is compiled with a division by their number.
    constants |= {"HEADS": heads, "KV_HEADS": max(1, kv_heads), "SIGN": -1 if conjugate else 1}
    launch(_rotary_kernel, (tiles,), q, k, v, *outs, *tables, tokens, *strides, **constants, **options)


def _rotary_triton(
    q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, conjugate: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    sources, targets = (q, k, None), (q_out, k_out, None)
    _launch(sources, targets, q.shape[1], k.shape[1], positions, cos, sin, conjugate)
    return q_out, k_out


def _split_rotary_triton(
    qkv: Tensor, heads: int, kv_heads: int, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    targets = _fake_split(qkv, heads, kv_heads)
    _launch(qkv, targets, heads, kv_heads, positions, cos, sin, False)
    return targets


def _split_rotary_bwd_triton(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    heads: int,
    kv_heads: int,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    dqkv = _fake_split_bwd(dq, dk, dv, heads, kv_heads)
    _launch((dq, dk, dv), dqkv, heads, kv_heads, positions, cos, sin, True)
    return dqkv


def _rotary_fwd(
    q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, conjugate: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    for x, out in ((q, q_out), (k, k_out)):
        _turn_into(out, x, positions, cos, sin, conjugate)
    return q_out, k_out


def _turn_into(out: Tensor, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> None:
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    sign = -1 if conjugate else 1
    wide = accumulation_dtype(x.dtype)
    a, b = x.to(wide).chunk(2, dim=-1)
    turned = out if out.dtype == wide else torch.empty(x.shape, dtype=wide, device=x.device)
    turned_a, turned_b = turned.chunk(2, dim=-1)
    torch.mul(a, cos, out=turned_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=turned_b).addcmul_(a, sin, value=sign)
    if turned is not out:
        out.copy_(turned)


def _split_rotary_fwd(
    qkv: Tensor, heads: int, kv_heads: int, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    return *_rotary_fwd(q, k, positions, cos, sin, False), v.clone(memory_format=torch.contiguous_format)


def _split_rotary_bwd(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    heads: int,
    kv_heads: int,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    dqkv = _fake_split_bwd(dq, dk, dv, heads, kv_heads)
    for index, (out, grad) in enumerate(zip(dqkv.split((heads, kv_heads, kv_heads), dim=1), (dq, dk, dv), strict=True)):
        if grad is None:
            out.zero_()
        elif index < 2:
            _turn_into(out, grad, positions, cos, sin, True)
        else:
            out.copy_(grad)
    return dqkv


def _fake_split(qkv: Tensor, heads: int, kv_heads: int, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, width = qkv.shape
    key = tokens, kv_heads, width
    return qkv.new_empty((tokens, heads, width)), qkv.new_empty(key), qkv.new_empty(key)


def _fake_split_bwd(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, heads: int, kv_heads: int, *_: Tensor
) -> Tensor:
    like = next(x for x in (dq, dk, dv) if x is not None)
    return like.new_empty((like.shape[0], heads + 2 * kv_heads, like.shape[2]))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:5])
    ctx.conjugate = inputs[5]


def _rotary_autograd(ctx, dq, dk):
    tables = *ctx.saved_tensors, not ctx.conjugate
    if dq is None:
        dk, _ = _rotary_op(dk, dk[:, :0], *tables)
    elif dk is None:
        dq, _ = _rotary_op(dq, dq[:, :0], *tables)
    else:
        dq, dk = _rotary_op(dq, dk, *tables)
    return dq, dk, None, None, None, None


def _save_for_split(ctx, inputs, output) -> None:
    _, ctx.heads, ctx.kv_heads, *tables = inputs
    ctx.save_for_backward(*tables)


def _split_rotary_autograd(ctx, dq, dk, dv):
    dqkv = _split_rotary_bwd_op(dq, dk, dv, ctx.heads, ctx.kv_heads, *ctx.saved_tensors)
    return dqkv, None, None, None, None, None


_rotary_op = register_op(
    "rotary(Tensor q, Tensor k, Tensor positions, Tensor cos, Tensor sin, bool conjugate) -> (Tensor, Tensor)",
    _rotary_fwd,
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    triton=_rotary_triton,
    setup_context=_save,
    backward=_rotary_autograd,
)
_split_rotary_op = register_op(
    "split_rotary(Tensor qkv, SymInt heads, SymInt kv_heads, Tensor positions, Tensor cos, Tensor sin)"
    " -> (Tensor, Tensor, Tensor)",
    _split_rotary_fwd,
    _fake_split,
    triton=_split_rotary_triton,
    setup_context=_save_for_split,
    backward=_split_rotary_autograd,
)
_split_rotary_bwd_op = register_op(
    "split_rotary_bwd(Tensor? dq, Tensor? dk, Tensor? dv, SymInt heads, SymInt kv_heads, Tensor positions, Tensor cos,"
    " Tensor sin) -> Tensor",
    _split_rotary_bwd,
    _fake_split_bwd,
    triton=_split_rotary_bwd_triton,
)


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions.

    Args:
        q: [T, H, h], h even. Computed in fp32 (fp64 for fp64).
        k: [T, K, h], dtype of q. Both may be slices of a wider product.
        positions: int64 [T], rows of the tables.
        cos, sin: fp32 [P, h/2]. No gradient flows to them.
    Returns:
        (q, k) rotated: contiguous, shapes and dtypes of the arguments.
    Raises:
        ValueError: shapes do not fit.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or k.dtype != q.dtype:
        raise ValueError(f"q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} do not fit")
    _check(q, positions, cos, sin)
    if use_reference():
        return rotary_reference(q, k, positions, cos, sin)
    turned = _rotary_op(q, k, positions, cos, sin, False)
    offer_recipe(turned, _rotary_op, q, k, positions, cos, sin, False)
    return turned


def split_rotary(
    qkv: Tensor, heads: int, kv_heads: int, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take queries, keys and values out of their fused product, and rotate queries and keys.

    Args:
        qkv: [T, H + 2K, h], h even: H = heads of queries, then K = kv_heads of keys, then of values. Computed in fp32
            (fp64 for fp64).
        positions: int64 [T], rows of the tables.
        cos, sin: fp32 [P, h/2]. No gradient flows to them.
    Returns:
        (q [T, H, h], k [T, K, h], v [T, K, h]) in the dtype of qkv, each contiguous in memory of its own.
    Raises:
        ValueError: shapes do not fit.
    """
    if qkv.ndim != 3 or min(heads, kv_heads) < 1 or qkv.shape[1] != heads + 2 * kv_heads:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} does not hold {heads} heads of queries and {kv_heads} of keys and values"
        )
    _check(qkv, positions, cos, sin)
    if use_reference():
        return split_rotary_reference(qkv, heads, kv_heads, positions, cos, sin)
    return _split_rotary_op(qkv, heads, kv_heads, positions, cos, sin)


def _check(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    tokens, _, width = x.shape
    if positions.shape != (tokens,):
        raise ValueError(f"positions {tuple(positions.shape)} and {tokens} tokens do not fit")
    if width % 2 or cos.ndim != 2 or cos.shape[1] * 2 != width or cos.shape != sin.shape:
        raise ValueError(f"tables {tuple(cos.shape)} and {tuple(sin.shape)} do not fit heads of width {width}")
