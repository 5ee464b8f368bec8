"""The public attention, and who computes it.

    provider  what                          device     dtypes                width       pages  gradients
    triton    our op, batch invariant       any        fp32, fp16, bf16      256 (GPU)   yes    not with pages
    flash     flash-attn, if installed      GPU        fp16, bf16            256, by 8   no     yes, deterministic
    sdpa      torch                         any        any                   any         yes    yes

All compute what `attention_reference` says, sliding windows included. `auto` takes the first line that fits:

    a chip that is neither an A100 nor an H100 or H200         sdpa
    16 bits on a GPU, no pages, and a line in providers.json   the first provider there that takes the call
    whatever triton takes                                      triton
    anything else                                              sdpa

providers.json is the measured part of the rule: a line for every chip, head width and pass (`forward`, without
gradients, or `training`, both ways) with providers, the fastest first, and what was measured, on what and when.
`measured: null` means that nobody has, and then our own kernels run. A graph of torch.compile passes over flash-attn,
which would break it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernels.attention.flash import attention_flash, flash_version
from kernels.attention.op import attention_op
from kernels.attention.reference import attention_reference
from kernels.attention.sdpa import attention_sdpa
from kernels.backend import chip, use_reference, use_triton

Provider = Literal["auto", "triton", "flash", "sdpa"]
PROVIDERS = ("triton", "flash", "sdpa")
MAX_WIDTH = 256  # of heads, for our kernels on a GPU
PATH = Path(__file__).with_name("providers.json")


class Call(NamedTuple):
    """What the choice of a provider depends on.

    arch: compute capability, 90 for 9.0; None when the tensors are not on a GPU.
    runs_triton: kernels of ours may run on these tensors.
    """

    arch: int | None
    runs_triton: bool
    dtype: torch.dtype
    width: int
    is_paged: bool
    has_gradient: bool
    is_compiling: bool = False


@functools.cache
def read_table() -> dict[str, dict[str, list[str] | str | None]]:
    return json.loads(PATH.read_text())


def table_key(arch: int, width: int, has_gradient: bool) -> str:
    """What a line of providers.json is found by: `sm_90 128 training`."""
    return f"sm_{arch} {width} {'training' if has_gradient else 'forward'}"


def refusal(provider: str, call: Call) -> str | None:
    """What keeps a provider from a call, None if nothing does."""
    if provider == "triton":
        if call.is_paged and call.has_gradient:
            return "has no gradients through a block table; use sdpa, or torch.no_grad()"
        if call.arch is not None and not call.runs_triton:
            return f"does not run {call.dtype} on a GPU, or is turned off by CHIMED_KERNELS; use sdpa"
        if call.arch is not None and call.width > MAX_WIDTH:
            return f"takes heads of at most {MAX_WIDTH}, not {call.width}; use sdpa"
    if provider == "flash":
        if call.arch is None:
            return "runs on a GPU; use triton, or sdpa"
        if call.dtype not in (torch.float16, torch.bfloat16):
            return f"takes fp16 and bf16, not {call.dtype}; use triton, or sdpa"
        if call.is_paged:
            return "takes no block table here; use triton, or sdpa"
        if call.width % 8 or flash_version(call.arch, call.width, call.has_gradient) is None:
            return f"is not installed in a version for heads of {call.width} on sm_{call.arch}; use triton, or sdpa"
    return None


def choose(call: Call) -> str:
    """The provider that `auto` takes: the rule at the top of this file."""
    if call.arch not in (None, 80, 90):
        return "sdpa"
    if call.arch is not None and call.dtype.itemsize == 2 and not call.is_paged:
        line = read_table().get(table_key(call.arch, call.width, call.has_gradient), {})
        for provider in line.get("order") or ():
            if not (provider == "flash" and call.is_compiling) and refusal(provider, call) is None:
                return provider
    return "sdpa" if refusal("triton", call) else "triton"


@functools.cache
def _resolve(provider: str, call: Call) -> tuple[str, int]:
    """(provider, version of flash-attn or 0)"""
    if provider == "auto":
        provider = choose(call)
    elif provider not in PROVIDERS:
        raise ValueError(f"provider is {provider!r}; it must be auto, {', '.join(PROVIDERS)}")
    elif (reason := refusal(provider, call)) is not None:
        raise ValueError(f"attention's provider {provider} {reason}")
    return provider, flash_version(call.arch or 0, call.width, call.has_gradient) or 0 if provider == "flash" else 0


# A compiled graph holds the answer, not the way to it.
@torch.compiler.assume_constant_result
def _provider_for(provider: str, device: torch.device, *facts: Any) -> tuple[str, int]:
    """facts: of a `Call`, all but the first."""
    return _resolve(provider, Call(chip(device).arch if device.type == "cuda" else None, *facts))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    block_table: Tensor | None = None,
    provider: Provider = "auto",
) -> Tensor:
    """Causal attention within each document, aligned at the bottom right (see `attention_reference`).

    Args:
        q: [Tq, H, h], any float dtype; sums and softmax in fp32 (fp64 for fp64).
        k, v: [Tk, K, h], or [blocks, page, K, h] with a block table; dtype of q; K divides H.
        cu_seqlens_q, cu_seqlens_k: int32 [D+1], cumulative lengths from 0 to Tq and Tk. Empty documents are
            allowed; with equal lengths (training) both are one tensor.
        max_q, max_k: upper bounds of the lengths, known to the host: launch grids are made from them.
        scale: of the scores, above 0; 1/sqrt(h) when None.
        window: a query sees its own key and the window - 1 before it; None sees all.
        block_table: int32 [D, pages], where in the cache each page of a document's keys lies; no gradients.
        provider: who computes it, see the top of this file.
    Returns:
        [Tq, H, h], dtype of q. By `triton`, a document's rows depend on that document alone, bitwise.
    Raises:
        ValueError: shapes do not fit, or the provider does not take the call.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, window, block_table)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    bounds = cu_seqlens_q, cu_seqlens_k
    if use_reference():
        return attention_reference(q, k, v, *bounds, scale=scale, window=window, block_table=block_table)
    has_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    facts = use_triton(q), q.dtype, q.shape[2], block_table is not None, has_gradient, torch.compiler.is_compiling()
    chosen, version = _provider_for(provider, q.device, *facts)
    if chosen == "sdpa":
        return attention_sdpa(q, k, v, *bounds, max_q, max_k, scale=scale, window=window, block_table=block_table)
    if chosen == "flash":
        return attention_flash(version, q, k, v, *bounds, max_q, max_k, scale=scale, window=window)
    return attention_op(q, k, v, *bounds, max_q, max_k, scale, window, block_table)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
    block_table: Tensor | None,
) -> None:
    ndim = 3 if block_table is None else 4
    if q.ndim != 3 or k.ndim != ndim or k.shape != v.shape or q.shape[2] != k.shape[-1] or q.shape[1] % k.shape[-2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)} do not fit")
    if block_table is not None and (block_table.ndim != 2 or len(block_table) != len(cu_seqlens_q) - 1):
        raise ValueError(f"block_table {tuple(block_table.shape)} does not fit {len(cu_seqlens_q) - 1} documents")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
