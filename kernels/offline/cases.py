"""Calls of every op that between them launch every kernel in every form a run may need.

Tensors are of the meta device: they have shapes, strides and alignment, and no memory, so sizes are those of real
training. What differs only in the number of rows launches the same kernels and is listed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.attention.decode import decode_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.sample import sample

TOKENS = 8192
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Matrix instructions of 16-bit products.
ON_TENSOR_CORES = {80: "mma", 90: "wgmma"}


@dataclass(frozen=True)
class Case:
    """One call of an op, and its backward where inputs require a gradient.

    shape: in words. width: columns of a row or entries of a head. arguments: makes the inputs.
    is_wide: rows begin at multiples of 16 bytes, so that 16 bytes can be moved at once.
    products: the instruction that 16-bit matrix products should become, for each architecture.
    is_model: candidates of the launch table are tried on this case; others of its kind have the same resources.
    """

    op: str
    shape: str
    dtype: torch.dtype
    width: int
    call: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    is_wide: bool = True
    products: dict[int, str] | None = None
    is_model: bool = False


def cases() -> Iterator[Case]:
    for of_op in (_norms, _decoding, _sampling):
        yield from of_op()


def _empty(*shape: int, dtype: torch.dtype, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _norms() -> Iterator[Case]:
    T = TOKENS

    def case(op: Callable[..., Any], inputs: int, width: int, dtype: torch.dtype) -> Case:
        def arguments() -> tuple[Any, ...]:
            x = (_empty(T, width, dtype=dtype, grad=True) for _ in range(inputs))
            return *x, _empty(width, dtype=dtype, grad=True), 1e-6

        is_wide = width * dtype.itemsize % 16 == 0
        return Case(op.__name__, f"T {T}, N {width}", dtype, width, op, arguments, is_wide)

    for width in (64, 512, 1000, 1023, 2048, 4096, 5120, 8192, 16384):
        yield case(rms_norm, 1, width, BF16)
        yield case(add_rms_norm, 2, width, BF16)
    for dtype in (FP16, FP32):
        for width in (4096, 16384):
            yield case(rms_norm, 1, width, dtype)
            yield case(add_rms_norm, 2, width, dtype)

    def heads(width: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """Queries out of a fused projection of 40 query heads and 8 for keys and values each."""
        projection = _empty(T, 56, width, dtype=dtype, grad=True)
        return projection[:, :40], _empty(width, dtype=dtype, grad=True), 1e-6

    for width in (64, 128):
        for dtype in (BF16, FP32):
            yield Case("rms_norm", f"T {T}, 40 heads of {width}", dtype, width, rms_norm, partial(heads, width, dtype))


def _decoding() -> Iterator[Case]:
    B, S, page = 64, 4096, 256

    def arguments(K: int, H: int, h: int, dtype: torch.dtype, paged: bool) -> tuple[Any, ...]:
        cache = (B * S // page, page, K, h) if paged else (B, S, K, h)
        q, k, v = _empty(B, H, h, dtype=dtype), _empty(*cache, dtype=dtype), _empty(*cache, dtype=dtype)
        return q, k, v, _empty(B, dtype=torch.int32), _empty(B, S // page, dtype=torch.int32) if paged else None

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None, window: int | None = None) -> Any:
        return decode_attention(q, k, v, lengths, block_table=table, window=window)

    def case(K: int, H: int, h: int, dtype: torch.dtype, paged: bool, window: int | None = None, **model: bool) -> Case:
        shape = f"B {B}, S {S}, H {H}/{K}, h {h}" + ", pages" * paged + f", window {window}" * bool(window)
        inputs = partial(arguments, K, H, h, dtype, paged)
        products = {80: "mma", 90: "mma"} if dtype != FP32 else None
        op = partial(call, window=window)
        return Case("decode_attention", shape, dtype, h, op, inputs, products=products, **model)

    for h in (64, 80, 96, 128, 256):
        for dtype in (BF16, FP32):
            yield case(8, 32, h, dtype, False, is_model=True)
        yield case(8, 32, h, BF16, True)
    yield case(8, 32, 128, FP16, False)
    yield case(40, 40, 128, BF16, False)
    yield case(8, 32, 128, BF16, False, window=1024)
    yield case(8, 32, 128, BF16, True, window=1024)
    for h in (16, 32):  # of the small models that tests and the demo train
        for dtype in (BF16, FP32):
            yield case(2, 4, h, dtype, False, is_model=True)


def _sampling() -> Iterator[Case]:
    B = 64

    def arguments(V: int, dtype: torch.dtype, ragged: bool) -> tuple[Any, ...]:
        step = _empty(B, dtype=torch.int64) if ragged else _empty(dtype=torch.int64)
        return _empty(B, V, dtype=dtype), _empty(B, dtype=FP32) if ragged else 0.7, _empty(B, dtype=torch.int64), step

    for V in (39424, 50264, 151936):
        for dtype in (BF16, FP32):
            for ragged in (False, True):
                shape = f"B {B}, V {V}" + ", own temperatures" * ragged
                yield Case("sample", shape, dtype, V, sample, partial(arguments, V, dtype, ragged))
