"""Activation checkpointing: keep less in the forward pass, compute it again in the backward pass.

none       everything is kept
selective  products and attention are kept; norms, rotary and activation are computed again, almost free
full       only each block's input is kept; the block's forward runs twice
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]


def apply_recompute(blocks: nn.ModuleList, mode: Recompute) -> None:
    """Wrap each block's `forward`; parameter names stay as they are. Comes before compile and sharding."""
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_the_costly)
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, **options)


def _keep_the_costly(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _costly_ops() else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _costly_ops() -> frozenset[Any]:
    """Ops whose time is worth their bytes: matrix products and attention, ours and torch's."""
    aten = torch.ops.aten
    found = {aten.mm.default, aten.addmm.default, aten.bmm.default}
    for name in dir(aten):
        if name.startswith("_scaled_dot_product_") and not name.endswith("_backward"):
            found.add(getattr(aten, name).default)
    for library, names in {"chimed": ("attention", "matmul_nt"), "torch_attn": ("_varlen_attn",)}.items():
        ops = getattr(torch.ops, library)
        found |= {getattr(ops, name).default for name in names if hasattr(ops, name)}
    return frozenset(found)
