"""Calls of every op that between them launch every kernel in every form that a run may need.

Tensors are of the meta device: they have shapes, strides and alignment, and no memory, so sizes are those of real
training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.adamw import adamw
from kernels.attention import attention
from kernels.attention.decode import decode_attention
from kernels.bench import work
from kernels.cross_entropy import cross_entropy
from kernels.fp8_linear import fp8_linear
from kernels.gae import gae
from kernels.grad_norm import grad_norm
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_logprob import linear_logprob
from kernels.low_rank import low_rank_linear
from kernels.offline.audit import ON_TENSOR_CORES, Case
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import rotary, split_rotary
from kernels.sample import sample
from kernels.swiglu import swiglu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
# Tokens of a pack, and vocabularies: ours, one that no power of two above 8 divides, and Qwen's.
TOKENS = 8192
VOCABULARIES = (39424, 50264, 151936)


def cases() -> Iterator[Case]:
    """All cases; then all again with a row, a token or a document less, so with counts that are no multiple of 16.

    Those launch nothing new where kernels are not specialised for the number of rows, and are audited where they are.
    """
    ops = (
        _norms, _head_norms, _rotary, _swiglu, _attention, _decoding, _cross_entropy, _heads_of_models, _low_rank,
        _eight_bits, _updates, _sampling, _advantages,
    )  # fmt: skip
    for of_op in ops:
        yield from of_op(0)
    for of_op in ops:
        yield from (replace(case, is_model=False, work=None) for case in of_op(1))


def _empty(*shape: int, dtype: torch.dtype, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _norms(less: int) -> Iterator[Case]:
    T = TOKENS - less

    def arguments(arrays: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
        x = (_empty(T, width, dtype=dtype, grad=True) for _ in range(arrays))
        return *x, _empty(width, dtype=dtype, grad=True), 1e-6

    ops: dict[str, Callable[..., Any]] = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}
    forms = [(width, BF16) for width in (512, 1000, 1023, 2048, 4096, 5120, 8192, 16384)]
    forms += [(width, dtype) for dtype in (FP16, FP32) for width in (4096, 16384)]
    for width, dtype in forms:
        for arrays, (name, op) in enumerate(ops.items(), start=1):
            yield Case(
                name,
                f"T {T}, N {width}",
                dtype,
                width,
                op,
                partial(arguments, arrays, width, dtype),
                wide_share=0.5 if width % 16 == 0 else 0,  # of arguments, Triton sees only multiples of 16
                work=work.norm_work(T, width, 2, arrays == 2) if dtype == BF16 and width in (4096, 8192) else None,
            )


def _head_norms(less: int) -> Iterator[Case]:
    """Queries out of a fused projection of 40 query heads, and 8 of keys and of values."""
    T = TOKENS - less

    def arguments(width: int, dtype: torch.dtype) -> tuple[Any, ...]:
        projection = _empty(T, 56, width, dtype=dtype, grad=True)
        return projection[:, :40], _empty(width, dtype=dtype, grad=True), 1e-6

    for width in (64, 128):
        for dtype in (BF16, FP32):
            shape = f"T {T}, 40 heads of {width}"
            yield Case("rms_norm", shape, dtype, width, rms_norm, partial(arguments, width, dtype))


def _rotary(less: int) -> Iterator[Case]:
    """Queries and keys by themselves, and out of the projection that also holds the values."""
    T, H, K = TOKENS - less, 32, 8

    def tables(width: int) -> tuple[Tensor, ...]:
        return _empty(T, dtype=torch.int64), *(_empty(T, width // 2, dtype=FP32) for _ in range(2))

    def apart(width: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return *(_empty(T, heads, width, dtype=dtype, grad=True) for heads in (H, K)), *tables(width)

    def joined(width: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return _empty(T, H + 2 * K, width, dtype=dtype, grad=True), H, K, *tables(width)

    for width in (64, 80, 96, 128, 256):
        for dtype in DTYPES if width == 128 else (BF16,):
            shape = f"T {T}, H {H}/{K}, h {width}"
            least = work.rotary_work(T, H + K, width, T, 2) if width == 128 and dtype == BF16 else None
            yield Case("rotary", shape, dtype, width, rotary, partial(apart, width, dtype), work=least)
            yield Case("split_rotary", shape, dtype, width, split_rotary, partial(joined, width, dtype))


def _swiglu(less: int) -> Iterator[Case]:
    T = TOKENS - less

    def arguments(columns: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return (_empty(T, 2 * columns, dtype=dtype, grad=True),)

    for columns, dtype in ((14336, BF16), (13824, BF16), (1376, BF16), (1377, BF16), (14336, FP16), (14336, FP32)):
        yield Case(
            "swiglu",
            f"T {T}, F {columns}",
            dtype,
            columns,
            swiglu,
            partial(arguments, columns, dtype),
            wide_share=0.5 if columns % 16 == 0 else 0,
            work=work.swiglu_work(T, columns, 2) if (columns, dtype) == (14336, BF16) else None,
        )


def _attention(less: int) -> Iterator[Case]:
    D, T, page = 8 - less, 16384 - less, 256

    def arguments(H: int, K: int, h: int, dtype: torch.dtype, paged: bool) -> tuple[Any, ...]:
        keys = (T // page, page, K, h) if paged else (T, K, h)
        q, k, v = (_empty(*shape, dtype=dtype, grad=not paged) for shape in ((T, H, h), keys, keys))
        bounds = _empty(D + 1, dtype=torch.int32)
        return q, k, v, bounds, bounds, T, T, _empty(D, T // page, dtype=torch.int32) if paged else None

    def call(*inputs: Any, window: int | None) -> Tensor:
        *tensors, table = inputs
        return attention(*tensors, window=window, block_table=table)

    def case(
        H: int, K: int, h: int, dtype: torch.dtype, *, paged: bool = False, window: int | None = None, **keywords: Any
    ) -> Case:
        shape = f"T {T}, H {H}/{K}, h {h}" + ", pages" * paged + f", window {window}" * bool(window)
        products = ON_TENSOR_CORES if dtype != FP32 else None
        op, inputs = partial(call, window=window), partial(arguments, H, K, h, dtype, paged)
        return Case(
            "attention", shape, dtype, h, op, inputs, wide_share=0.5 if h >= 64 else 0, products=products, **keywords
        )

    for h in (64, 80, 96, 128, 256):
        least = work.attention_work([T], 32, 8, h, 2) if h in (64, 128) else None
        is_power = h & (h - 1) == 0  # the others share their entries
        yield case(32, 8, h, BF16, is_model=is_power, work=least)
        yield case(32, 8, h, BF16, paged=True)
        if is_power:
            yield case(32, 8, h, FP32, is_model=True)
    yield case(32, 8, 128, FP16)
    yield case(40, 40, 128, BF16)
    yield case(32, 8, 128, BF16, window=4096)
    yield case(32, 8, 128, BF16, paged=True, window=4096)
    for h in (16, 32):  # of the small models that tests and the demo train
        for dtype in (BF16, FP32):
            yield case(4, 2, h, dtype)


def _decoding(less: int) -> Iterator[Case]:
    B, S, page = 64 - less, 4096, 256

    def arguments(H: int, K: int, h: int, dtype: torch.dtype, paged: bool) -> tuple[Any, ...]:
        cache = (B * S // page, page, K, h) if paged else (B, S, K, h)
        q, k, v = (_empty(*shape, dtype=dtype) for shape in ((B, H, h), cache, cache))
        return q, k, v, _empty(B, dtype=torch.int32), _empty(B, S // page, dtype=torch.int32) if paged else None

    def call(*inputs: Any, window: int | None) -> Tensor:
        *tensors, table = inputs
        return decode_attention(*tensors, window=window, block_table=table)

    def case(
        H: int, K: int, h: int, dtype: torch.dtype, *, paged: bool = False, window: int | None = None, **keywords: Any
    ) -> Case:
        shape = f"B {B}, S {S}, H {H}/{K}, h {h}" + ", pages" * paged + f", window {window}" * bool(window)
        # One query a head fills a quarter of what `wgmma` takes.
        products = {80: "mma", 90: "mma"} if dtype != FP32 else None
        op, inputs = partial(call, window=window), partial(arguments, H, K, h, dtype, paged)
        return Case("decode_attention", shape, dtype, h, op, inputs, products=products, **keywords)

    for h in (64, 80, 96, 128, 256):
        is_power = h & (h - 1) == 0
        least = work.decode_work([S] * B, 32, 8, h, 2) if h == 128 else None
        yield case(32, 8, h, BF16, is_model=is_power, work=least)
        yield case(32, 8, h, BF16, paged=True)
        if is_power:
            yield case(32, 8, h, FP32, is_model=True)
    yield case(32, 8, 128, FP16)
    yield case(40, 40, 128, BF16)
    yield case(32, 8, 128, BF16, window=1024)
    yield case(32, 8, 128, BF16, paged=True, window=1024)
    for h in (16, 32):
        for dtype in (BF16, FP32):
            yield case(4, 2, h, dtype)


def _cross_entropy(less: int) -> Iterator[Case]:
    T = TOKENS - less

    def arguments(V: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return _empty(T, V, dtype=dtype, grad=True), _empty(T, dtype=torch.int64), 1e-4

    for V in VOCABULARIES:
        for dtype in DTYPES if VOCABULARIES[0] == V else (BF16,):
            shape = f"T {T}, V {V}"
            least = work.cross_entropy_work(T, V, 2) if dtype == BF16 else None
            yield Case("cross_entropy", shape, dtype, V, cross_entropy, partial(arguments, V, dtype), work=least)


def _heads_of_models(less: int) -> Iterator[Case]:
    T, d = TOKENS - less, 4096

    def arguments(V: int, dtype: torch.dtype) -> tuple[Any, ...]:
        hidden, weight = (_empty(rows, d, dtype=dtype, grad=True) for rows in (T, V))
        return hidden, weight, _empty(T, dtype=torch.int64)

    def heated(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return linear_logprob(hidden, weight, targets, _empty(T, dtype=FP32), with_entropy=True)

    for V in VOCABULARIES:
        for dtype in DTYPES if VOCABULARIES[0] == V else (BF16,):
            shape, inputs = f"T {T}, d {d}, V {V}", partial(arguments, V, dtype)
            least = work.head_work(T, d, V, 2) if dtype == BF16 else None
            entropy = f"{shape}, entropy, temperatures"
            yield Case("linear_cross_entropy", shape, dtype, V, linear_cross_entropy, inputs)
            yield Case("linear_logprob", shape, dtype, V, linear_logprob, inputs, work=least)
            yield Case("linear_logprob", entropy, dtype, V, heated, inputs)


def _low_rank(less: int) -> Iterator[Case]:
    """Queries, keys and values, all with adapters or only queries and values; gate and up; one matrix."""
    T, d = TOKENS - less, 4096

    def arguments(sizes: tuple[int, ...], present: tuple[bool, ...], rank: int, dtype: torch.dtype) -> tuple[Any, ...]:
        out, rows = sum(sizes), sum(size for size, there in zip(sizes, present, strict=True) if there)
        bias = _empty(out, dtype=dtype) if len(sizes) == 3 else None
        a, b = (_empty(*shape, dtype=dtype, grad=True) for shape in ((sum(present) * rank, d), (rows, rank)))
        x, weight = _empty(T, d, dtype=dtype, grad=True), _empty(out, d, dtype=dtype)
        return x, weight, bias, a, b, 2.0, sizes, present

    def case(
        op: Callable[..., Any], sizes: tuple[int, ...], present: tuple[bool, ...], rank: int, dtype: torch.dtype
    ) -> Case:
        adapted = tuple(size for size, there in zip(sizes, present, strict=True) if there)
        return Case(
            "low_rank_linear",
            f"T {T}, d {d}, {'+'.join(map(str, sizes))}, {len(adapted)} of rank {rank}",
            dtype,
            rank,
            op,
            partial(arguments, sizes, present, rank, dtype),
            # A bias is read a few columns at a time, and rows of b begin anywhere.
            wide_share=0 if rank % 8 else 0.25 if len(sizes) == 3 else 0.5,
            products=ON_TENSOR_CORES if dtype != FP32 else None,
            work=work.low_rank_work(T, d, sum(sizes), adapted, rank, 2) if rank == 16 and dtype == BF16 else None,
        )

    for dtype in DTYPES:
        yield case(low_rank_linear, (4096, 1024, 1024), (True, True, True), 16, dtype)
    for rank in (8, 32):
        yield case(low_rank_linear, (4096, 1024, 1024), (True, False, True), rank, BF16)
    for rank in (1, 4, 16, 32):
        yield case(low_rank_linear, (13696, 13696), (True, True), rank, BF16)
    for dtype in (BF16, FP32):
        yield case(low_rank_linear, (4096,), (True,), 16, dtype)
        yield case(low_rank_linear, (4096,), (True,), 32, dtype)
        for rank in (64, 256):  # no kernel takes part in these gradients
            yield case(torch.no_grad()(low_rank_linear), (4096,), (True,), rank, dtype)


def _eight_bits(less: int) -> Iterator[Case]:
    """Into and out of a feed-forward layer, and of a small model."""
    T = TOKENS - less

    def arguments(out: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return _empty(T, width, dtype=dtype, grad=True), _empty(out, width, dtype=dtype, grad=True)

    for out, width, dtype in ((22016, 4096, BF16), (4096, 11008, BF16), (384, 128, BF16), (22016, 4096, FP32)):
        shape, inputs = f"T {T}, {width} to {out}", partial(arguments, out, width, dtype)
        yield Case("fp8_linear", shape, dtype, width, fp8_linear, inputs, chips=(90,))


def _updates(less: int) -> Iterator[Case]:
    sizes = ((5120, 5120 - less), (13824, 5120), (5120,), (37,))

    def tensors(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(_empty(*size, dtype=dtype) for size in sizes)

    def updates(grads: torch.dtype, beside: dict[str, Any]) -> tuple[Any, ...]:
        lists = {name: tensors(of) if isinstance(of, torch.dtype) else of for name, of in beside.items()}
        return tensors(BF16 if "remainders" in beside else FP32), tensors(grads), lists

    def step(params: tuple[Tensor, ...], grads: tuple[Tensor, ...], beside: dict[str, Any]) -> None:
        scalars = {name: _empty(dtype=FP32) for name in ("lr", "step", "clip_scale", "should_skip")}
        state = params, grads, tensors(FP32), tensors(FP32)
        adamw(*state, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **beside, **scalars)

    def of_all(*grads: Tensor) -> Tensor:
        return grad_norm(grads)

    numbers = sum(_empty(*size, dtype=FP32).numel() for size in sizes)
    forms: dict[str, dict[str, Any]] = {
        "": {},
        ", shadow": {"shadows": BF16},
        ", stochastic shadow": {"shadows": BF16, "rounding_seed": 1},
        ", halves": {"remainders": torch.int16},
    }
    for dtype in (FP32, BF16):
        for name, beside in forms.items():
            shape = f"{numbers / 1e6:.0f} M numbers{name}"
            inputs = partial(updates, dtype, beside)
            least = work.adamw_work(numbers) if dtype == FP32 and not name else None
            yield Case("adamw", shape, dtype, 0, step, inputs, wide_share=0.25, work=least)
    for dtype in DTYPES:
        shape, least = f"{numbers / 1e6:.0f} M numbers", work.grad_norm_work(numbers) if dtype == FP32 else None
        yield Case("grad_norm", shape, dtype, 0, of_all, partial(tensors, dtype), wide_share=0.25, work=least)


def _sampling(less: int) -> Iterator[Case]:
    B = 64 - less

    def arguments(V: int, dtype: torch.dtype, ragged: bool) -> tuple[Any, ...]:
        seeds, heat = _empty(B, dtype=torch.int64), _empty(B, dtype=FP32) if ragged else 0.7
        return _empty(B, V, dtype=dtype), heat, seeds, _empty(*[B] * ragged, dtype=torch.int64)

    for V in VOCABULARIES:
        for dtype, ragged in ((BF16, False), (BF16, True), (FP32, True)):
            shape = f"B {B}, V {V}" + ", own temperatures" * ragged
            least = work.sample_work(B, V, 2) if dtype == BF16 and not ragged else None
            yield Case("sample", shape, dtype, V, sample, partial(arguments, V, dtype, ragged), work=least)


def _advantages(less: int) -> Iterator[Case]:
    D, T = 512 - less, 262144 - less

    def arguments(dtype: torch.dtype, with_bootstrap: bool) -> tuple[Any, ...]:
        rewards, values = (_empty(T, dtype=dtype) for _ in range(2))
        bounds, mask = _empty(D + 1, dtype=torch.int32), _empty(T, dtype=torch.bool)
        return rewards, values, bounds, mask, 1.0, 0.95, _empty(D, dtype=dtype) if with_bootstrap else None

    for dtype, with_bootstrap in ((FP32, False), (FP32, True), (BF16, True)):
        shape = f"T {T}, D {D}" + ", bootstrap" * with_bootstrap
        least = work.gae_work(T) if not with_bootstrap else None
        yield Case("gae", shape, dtype, 0, gae, partial(arguments, dtype, with_bootstrap), wide_share=0, work=least)
