"""The provider `flash`: flash-attn 2, 3 or 4, where one is installed (Dao 2023; Shah et al. 2024).

Their variable-length functions take what ours takes: packed documents, bounds that stay on the device, a causal mask
aligned at the bottom right, zeros for queries that see no key. They differ in names and signatures:

    2   flash_attn                     A100 and later; window (-1, -1) is none; returns the output
    3   flash_attn_3 or, as built from its folder, flash_attn_interface
                                       Hopper; as 2, but returns (output, log-sum-exp) in some versions
    4   flash_attn.cute                Hopper and later; window (None, None) is none; returns (output, log-sum-exp)

The backward is asked to be deterministic; 3 and 4 refuse that for heads above 192. Nothing is imported before the
provider is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.attention.sdpa import attention_sdpa

_PLACES = {
    2: ("flash_attn",),
    3: ("flash_attn_3.flash_attn_interface", "flash_attn_interface"),
    4: ("flash_attn.cute",),
}
# The fastest first. On Hopper that is 3, which is written for it.
_ORDER = {80: (2,), 90: (3, 4, 2)}
_ORDER_ELSEWHERE = (4, 2)
_MAX_WIDTH = 256
_MAX_DETERMINISTIC_WIDTH = {2: 256, 3: 192, 4: 192}


@functools.cache
def varlen_function(version: int) -> Callable[..., Any] | None:
    """flash_attn_varlen_func of a version of flash-attn, None where it is not installed or does not load."""
    for place in _PLACES[version]:
        try:
            return importlib.import_module(place).flash_attn_varlen_func
        except (ImportError, OSError, AttributeError):
            continue
    return None


def flash_version(arch: int, width: int, has_gradient: bool) -> int | None:
    """The version of flash-attn to use on a chip, None where there is none for these heads."""
    for version in _ORDER.get(arch, _ORDER_ELSEWHERE):
        widest = _MAX_DETERMINISTIC_WIDTH[version] if has_gradient else _MAX_WIDTH
        if width <= widest and varlen_function(version) is not None:
            return version
    return None


# Version 4 is not made for torch.compile; the others depend on their build.
@torch.compiler.disable(reason="flash-attn is not traced; attention's provider auto takes another in a graph")
def attention_flash(
    version: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """As `attention_reference`, for fp16 and bf16 on a GPU.

    Args:
        version: of flash-attn, as `flash_version` gives it.
        max_q, max_k: upper bounds of the lengths.
    """
    if q.numel() == 0 or k.numel() == 0:  # not every version starts a kernel on nothing
        return attention_sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale=scale, window=window)
    unbounded = None if version == 4 else -1
    function = varlen_function(version)
    assert function is not None
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        softmax_scale=scale,
        causal=True,
        window_size=(unbounded, unbounded) if window is None else (window - 1, 0),
        deterministic=True,
    )
    return out[0] if isinstance(out, tuple) else out
