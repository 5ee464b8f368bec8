"""Whom the ops are compared with, as far as they are installed: nothing here is needed, and nothing is imported
before it is asked for.

    eager    what one would write with torch; its fused functions where it has them
    compile  the op's reference under torch.compile, at the first shapes of an op only, for its minutes
    liger    Liger-Kernel, versions 0.5 to 0.8
    flash2, flash3    flash-attn, its kernels for Ampere and for Hopper
    cudnn    cuDNN's attention, through torch
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Where each is found, the first that is there.
PLACES = {
    "liger": ("liger_kernel.ops.rms_norm",),
    "flash2": ("flash_attn",),
    "flash3": ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
}


@functools.cache
def module(name: str) -> Any:
    """An installed module, or a sentence on why there is none."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that does not fit this torch raises whatever it likes
        return f"{type(error).__name__}: {error}"[:200]


def liger(name: str, function: str) -> Any | None:
    """An autograd function of liger_kernel.ops, None where this version has none."""
    return getattr(module(f"liger_kernel.ops.{name}"), function, None)


def flash(version: int, function: str) -> Callable[..., Any] | None:
    """A function of flash-attn 2 or 3, whose results other than the first are dropped."""
    for place in PLACES[f"flash{version}"]:
        found = getattr(module(place), function, None)
        if found is not None:
            return lambda *args, **keywords: _first(found(*args, **keywords))
    return None


def torch_varlen() -> Callable[..., Any] | None:
    """Causal attention on packed documents by torch's own flash kernels (torch 2.10 and later)."""
    attend = getattr(module("torch.nn.attention.varlen"), "varlen_attn", None)
    if attend is None:
        return None
    parameters = inspect.signature(attend).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    if "enable_gqa" in parameters:
        causal["enable_gqa"] = True

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Any:
        return _first(attend(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal))

    return run


def has_cudnn_attention(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cudnn.is_available()


def with_cudnn(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, where scaled_dot_product_attention may use cuDNN only."""

    def run(*args: Any) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return call(*args)

    return run


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call under torch.compile, for static shapes, whose backward can be run more than once."""
    # Otherwise the backward overwrites what the forward saved.
    torch._functorch.config.donated_buffer = False
    return torch.compile(call, dynamic=False)


def missing(device: torch.device) -> dict[str, str]:
    """Peers that are not there, and why."""
    reasons = {}
    for peer, places in PLACES.items():
        found = [module(place) for place in places]
        if all(isinstance(one, str) for one in found):
            reasons[peer] = found[0]
    if not has_cudnn_attention(device):
        reasons["cudnn"] = "cuDNN is for CUDA devices"
    return reasons


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    return {
        package: importlib.metadata.version(package)
        for package in ("liger_kernel", "flash_attn", "flash_attn_3")
        if _is_installed(package)
    }


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _first(results: Any) -> Any:
    return results[0] if isinstance(results, tuple) else results
