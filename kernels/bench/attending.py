"""Workloads of attention: packed documents in training, and one query against a cache in decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import attention, attention_reference
from kernels.attention.decode import decode_attention, decode_attention_reference
from kernels.attention.dispatch import Provider
from kernels.attention.flash import flash_version
from kernels.backend import chip
from kernels.bench import peers, targets, work
from kernels.bench.rowwise import Random
from kernels.bench.workload import OURS, Contender, Inputs, Outcome, Target, Workload

# The last queries of the longest and of the last document are compared with the reference, for the heads of one
# group: its scores are a matrix. The gradients of the last keys come from these queries alone.
CHECKED_QUERIES = 256
PAGE = 256  # flash-attn 2 takes multiples of it


def bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens, int32 [D + 1]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def attention_workload(
    lengths: Sequence[int],
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    name: str = "",
    aims: Sequence[Target] = (),
    equal_work: Sequence[int] | None = None,
) -> Workload:
    """Causal attention over documents of these lengths.

    Args:
        name: of the lengths, where listing them is no help.
        equal_work: equal lengths that need the same work; ours on these is then timed too, as a bound.
    """

    def make_for(lengths: Sequence[int], seed: int) -> Inputs:
        random = Random(seed, device, dtype)
        tokens = sum(lengths)
        q, k, v = (random.normal(tokens, n, width) for n in (heads, kv_heads, kv_heads))
        return q, k, v, bounds(lengths, device), max(lengths)

    def through(provider: Provider) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
            return attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, provider=provider)

        return call

    own = through("triton")
    contenders = [Contender(OURS, own, "ours"), Contender("auto", through("auto"), "provider")]
    contenders += [Contender(f"provider {one}", through(one), "provider") for one in _other_providers(width, device)]
    contenders += _training_peers(lengths, heads, kv_heads, device)
    if equal_work is not None:
        contenders.append(
            Contender("equal lengths", own, "bound", adapt=lambda _, made=make_for: made(equal_work, 0))  # type: ignore[misc]
        )
    aims = [*aims, *(targets.share_of_best(stage, "auto", 0.97) for stage in ("forward", "both"))]
    if equal_work is not None:
        ratio = sum(n * (n + 1) for n in lengths) / sum(n * (n + 1) for n in equal_work)
        aims = [*aims, *(targets.times(stage, "equal lengths", 1.1 * ratio) for stage in ("forward", "backward"))]
    documents = name or f"{len(lengths)}x{lengths[0]}"
    return Workload(
        "attention",
        f"{documents}, {heads}:{kv_heads} heads of {width}",
        dtype,
        work.attention_work(lengths, heads, kv_heads, width, dtype.itemsize),
        partial(make_for, lengths),
        contenders,
        partial(_attention_check, lengths),
        targets=aims,
    )


def _attention_check(
    lengths: Sequence[int], inputs: Inputs, upstream: list[Tensor], outcome: Outcome
) -> Iterator[tuple[str, Tensor, Tensor]]:
    q, k, v = (x.detach() for x in inputs[:3])
    (out,), (dq, dk, dv) = outcome
    group = q.shape[1] // k.shape[1]
    ends = list(accumulate(lengths))
    for document in {lengths.index(max(lengths)), len(lengths) - 1}:
        length, end = lengths[document], ends[document]
        count = min(CHECKED_QUERIES, length)
        queries, keys = slice(end - count, end), slice(end - length, end)
        query, key, value = q[queries, :group], k[keys, :1], v[keys, :1]
        query, key, value = (x.float().requires_grad_() for x in (query, key, value))
        spans = bounds([count], q.device), bounds([length], q.device)
        expected = attention_reference(query, key, value, *spans, scale=q.shape[2] ** -0.5, window=None)
        expected.backward(upstream[0][queries, :group].float())
        yield f"document {document}", out[queries, :group], expected.detach()
        for what, found, leaf, heads in (("q", dq, query, group), ("k", dk, key, 1), ("v", dv, value, 1)):
            assert leaf.grad is not None
            yield f"gradient of {what} of document {document}", found[queries, :heads], leaf.grad[-count:]


def _other_providers(width: int, device: torch.device) -> list[Provider]:
    if device.type != "cuda":
        return ["sdpa"]
    return ["sdpa"] if flash_version(chip(device).arch, width, has_gradient=True) is None else ["sdpa", "flash"]


def _training_peers(lengths: Sequence[int], heads: int, kv_heads: int, device: torch.device) -> list[Contender]:
    """flash-attn on packed documents; torch's attention on a batch, where lengths are equal, or on packed ones."""
    contenders = []
    for version in (2, 3):
        flash = peers.flash(version, "flash_attn_varlen_func")
        if flash is not None:

            def packed(q, k, v, cu_seqlens, longest, flash=flash):
                return flash(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)

            contenders.append(Contender(f"flash{version}", packed))

    def batched(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        return out.transpose(1, 2).flatten(0, 1)

    if len(set(lengths)) == 1:
        contenders.append(Contender("eager", batched))
        if peers.has_cudnn_attention(device):
            contenders.append(Contender("cudnn", peers.with_cudnn(batched)))
    varlen = peers.torch_varlen()
    if len(set(lengths)) > 1 and varlen is not None and device.type == "cuda":
        contenders.append(Contender("eager", varlen))
    return contenders


def decode_workload(
    rows: int,
    context: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    paged: bool = False,
    aims: Sequence[Target] = (),
) -> Workload:
    """Every row has the whole context in its cache; pages of PAGE keys lie in random order."""

    def make(seed: int) -> Inputs:
        random = Random(seed, device, dtype)
        q = random.normal(rows, heads, width, has_grad=False)
        lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
        if not paged:
            k, v = (random.normal(rows, context, kv_heads, width, has_grad=False) for _ in range(2))
            return q, k, v, lengths, None
        pages = math.ceil(context / PAGE)
        k, v = (random.normal(rows * pages, PAGE, kv_heads, width, has_grad=False) for _ in range(2))
        order = random.integers(1 << 30, rows * pages).argsort()
        return q, k, v, lengths, order.view(rows, pages).to(torch.int32)

    def ours(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None) -> Tensor:
        return decode_attention(q, k, v, lengths, block_table=table)

    def check(inputs: Inputs, _: list[Tensor], outcome: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
        q, k, v, lengths, table = inputs
        for row in {0, rows - 1}:
            one = slice(row, row + 1)
            key, value = (x[one] if table is None else x[table[row].long()].flatten(0, 1)[None] for x in (k, v))
            given = q[one].float(), key.float(), value.float(), lengths[one]
            expected = decode_attention_reference(*given, scale=width**-0.5, window=None)
            yield f"row {row}", outcome[0][0][one], expected

    return Workload(
        "decode_attention",
        f"{rows}x{context}, {heads}:{kv_heads} heads of {width}{', paged' if paged else ''}",
        dtype,
        work.decode_work([context] * rows, heads, kv_heads, width, dtype.itemsize),
        make,
        [Contender(OURS, ours, "ours"), *_decoding_peers(paged)],
        check,
        targets=aims,
    )


def _decoding_peers(paged: bool) -> list[Contender]:
    contenders = []

    def eager(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, _: None) -> Tensor:
        inside = torch.arange(k.shape[1], device=q.device) < lengths[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q[:, None], k, v))
        mask = inside[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).squeeze(2)

    if not paged:
        contenders.append(Contender("eager", eager))
    for version, table_name in ((2, "block_table"), (3, "page_table")):
        flash = peers.flash(version, "flash_attn_with_kvcache")
        if flash is not None:

            def cached(q, k, v, lengths, table, flash=flash, table_name=table_name):
                pages = {} if table is None else {table_name: table}
                return flash(q[:, None], k, v, cache_seqlens=lengths, causal=True, **pages).squeeze(1)

            contenders.append(Contender(f"flash{version}", cached))
    return contenders
