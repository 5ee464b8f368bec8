"""The list: every op over the shapes of models of 7 and 13 billion parameters, the telling shape of each op first.

Widths N are 4096 and 5120, feed-forward widths F 11008 and 13696, vocabularies V 39424 and 151936; packs hold 8192
or 16384 tokens, attention sees 32768 in documents of 1024 to 32768.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import zip_longest

import torch

from kernels.bench import targets
from kernels.bench.adapting import low_rank_workload
from kernels.bench.attending import attention_workload, decode_workload
from kernels.bench.eight_bits import fp8_linear_workload
from kernels.bench.head import linear_cross_entropy_workload, linear_logprob_workload
from kernels.bench.rowwise import cross_entropy_workload, norm_workload, swiglu_workload
from kernels.bench.turning import rotary_workload
from kernels.bench.updating import adamw_workload, gae_workload, grad_norm_workload, sample_workload
from kernels.bench.workload import Workload

BF16, FP32 = torch.bfloat16, torch.float32
# Document lengths of a pack of real text: a few long ones, many short ones; 32768 tokens in all.
RAGGED = (12288, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 64, 48, 32, 16)


def workloads(device: torch.device, ops: Collection[str] = (), is_quick: bool = False) -> list[Workload]:
    """All of them, or those of some ops; the first shapes of all ops before the second ones.

    Args:
        ops: names in BY_OP; none means all.
        is_quick: the first shape of each op only.
    """
    listed = [list(of_op(device)) for name, of_op in BY_OP.items() if not ops or name in ops]
    turns = list(zip_longest(*listed))
    return [one for turn in turns[: 1 if is_quick else None] for one in turn if one is not None]


def _norms(device: torch.device, with_residual: bool) -> Iterator[Workload]:
    yield norm_workload(8192, 4096, BF16, device, with_residual=with_residual, compiled=True)
    for rows, columns in ((16384, 4096), (8192, 5120), (16384, 5120)):
        yield norm_workload(rows, columns, BF16, device, with_residual=with_residual)
    yield norm_workload(8192, 4096, FP32, device, with_residual=with_residual)
    if not with_residual:
        yield norm_workload(8192 * 32, 128, BF16, device, with_residual=False, heads=32)


def _rotary(device: torch.device, is_split: bool) -> Iterator[Workload]:
    yield rotary_workload(8192, 32, 32, 128, BF16, device, is_split=is_split, compiled=True)
    for tokens, heads, kv_heads in ((16384, 32, 32), (8192, 32, 8), (16384, 40, 40)):
        yield rotary_workload(tokens, heads, kv_heads, 128, BF16, device, is_split=is_split)


def _swiglu(device: torch.device) -> Iterator[Workload]:
    yield swiglu_workload(8192, 11008, BF16, device, compiled=True)
    for tokens, columns in ((16384, 11008), (8192, 13696), (16384, 13696)):
        yield swiglu_workload(tokens, columns, BF16, device)
    yield swiglu_workload(8192, 11008, FP32, device)


def _cross_entropy(device: torch.device) -> Iterator[Workload]:
    yield cross_entropy_workload(8192, 39424, BF16, device, compiled=True)
    yield cross_entropy_workload(8192, 151936, BF16, device)
    yield cross_entropy_workload(8192, 39424, FP32, device)


def _linear_cross_entropy(device: torch.device) -> Iterator[Workload]:
    yield linear_cross_entropy_workload(8192, 4096, 39424, BF16, device, compiled=True)
    yield linear_cross_entropy_workload(8192, 4096, 151936, BF16, device)
    yield linear_cross_entropy_workload(16384, 5120, 39424, BF16, device)


def _linear_logprob(device: torch.device) -> Iterator[Workload]:
    yield linear_logprob_workload(8192, 4096, 39424, BF16, device, with_entropy=True, compiled=True)
    yield linear_logprob_workload(8192, 4096, 151936, BF16, device, with_entropy=True)
    for vocabulary in (39424, 151936):
        yield linear_logprob_workload(8192, 4096, vocabulary, BF16, device, with_entropy=False)
    yield linear_logprob_workload(16384, 5120, 39424, BF16, device, with_entropy=True)


def _low_rank_linear(device: torch.device) -> Iterator[Workload]:
    yield low_rank_workload(8192, 4096, (4096, 4096, 4096), 16, BF16, device, compiled=True)
    for rank in (16, 64):
        for width, inner in ((4096, 11008), (5120, 13696)):
            for columns, sizes in (
                (width, (width, width, width)),
                (width, (width,)),
                (width, (inner, inner)),
                (inner, (width,)),
            ):
                if (columns, sizes, rank) != (4096, (4096, 4096, 4096), 16):
                    yield low_rank_workload(8192, columns, sizes, rank, BF16, device)


def _fp8_linear(device: torch.device) -> Iterator[Workload]:
    for columns, out in ((4096, 22016), (11008, 4096), (4096, 12288), (5120, 27392), (13696, 5120)):
        yield fp8_linear_workload(8192, columns, out, BF16, device)


def _attention(device: torch.device) -> Iterator[Workload]:
    tokens = 32768
    aims = (targets.teraflops("forward", 450), targets.teraflops("backward", 330))
    yield attention_workload([16384] * 2, 32, 32, 128, BF16, device, aims=aims)
    equal = _equal_work(RAGGED)
    yield attention_workload(RAGGED, 32, 32, 128, BF16, device, name="ragged 32768", equal_work=equal)
    for length in (1024, 2048, 4096, 8192, 32768):
        yield attention_workload([length] * (tokens // length), 32, 32, 128, BF16, device)
    yield attention_workload([8192] * 4, 32, 8, 128, BF16, device)
    for heads, width in ((64, 64), (40, 80), (40, 96), (16, 256)):
        yield attention_workload([8192] * 4, heads, heads, width, BF16, device)
    yield attention_workload([16384] * 2, 40, 40, 128, BF16, device)


def _equal_work(lengths: tuple[int, ...]) -> list[int]:
    """Equal lengths with about as many tokens and as many visible pairs."""
    tokens = sum(lengths)
    length = sum(n * n for n in lengths) // tokens
    return [length] * round(tokens / length)


def _decode_attention(device: torch.device) -> Iterator[Workload]:
    yield decode_workload(64, 4096, 32, 8, 128, BF16, device, aims=[targets.percent("forward", 80)])
    yield decode_workload(64, 4096, 32, 8, 128, BF16, device, paged=True)
    for rows in (1, 8, 64):
        for context in (1024, 4096, 32768):
            if (rows, context) != (64, 4096):
                yield decode_workload(rows, context, 32, 8, 128, BF16, device)
    yield decode_workload(64, 4096, 40, 40, 128, BF16, device)


def _adamw(device: torch.device) -> Iterator[Workload]:
    yield adamw_workload(500_000_000, 300, device)
    yield adamw_workload(500_000_000, 300, device, beside="nearest")
    yield adamw_workload(500_000_000, 300, device, beside="random")
    yield adamw_workload(500_000_000, 300, device, beside="remainder")


def _grad_norm(device: torch.device) -> Iterator[Workload]:
    yield grad_norm_workload(500_000_000, 300, device)


def _sample(device: torch.device) -> Iterator[Workload]:
    yield sample_workload(256, 151936, BF16, device, compiled=True)
    for rows, vocabulary, dtype in ((64, 151936, BF16), (256, 39424, BF16), (64, 39424, BF16), (256, 151936, FP32)):
        yield sample_workload(rows, vocabulary, dtype, device)


def _gae(device: torch.device) -> Iterator[Workload]:
    yield gae_workload(512, 768, device)


BY_OP = {
    "rms_norm": lambda device: _norms(device, False),
    "add_rms_norm": lambda device: _norms(device, True),
    "rotary": lambda device: _rotary(device, False),
    "split_rotary": lambda device: _rotary(device, True),
    "swiglu": _swiglu,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_logprob": _linear_logprob,
    "low_rank_linear": _low_rank_linear,
    "fp8_linear": _fp8_linear,
    "attention": _attention,
    "decode_attention": _decode_attention,
    "adamw": _adamw,
    "grad_norm": _grad_norm,
    "sample": _sample,
    "gae": _gae,
}
