"""Activation checkpointing: keep less in the forward pass, compute it again in the backward pass.

none       everything that the backward pass reads is kept
selective  products and attention are kept; norms, rotary and activation are computed again, almost free
full       only each block's input is kept; the block's forward runs twice
"""

from __future__ import annotations

import functools
import re
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels.recipes import recipes_kept

Recompute = Literal["none", "selective", "full"]
_COSTLY = re.compile(
    r"aten::(mm|addmm|bmm)"
    r"|chimed::(matmul_nt|low_rank_linear|fp8_linear|attention)"
    r"|aten::_scaled_dot_product_(?!\w*backward)\w+"
    r"|torch_attn::_varlen_attn"
    r"|flash_attn\w*::\w*(fwd|forward)"
)


def apply_recompute(blocks: nn.ModuleList, mode: Recompute, is_compiled: bool = False) -> None:
    """Wrap each block's `forward`; parameter names stay as they are. Comes before compile and sharding.

    Args:
        is_compiled: torch.compile comes next. It cannot trace what `kernels.recipes` does; PyTorch's selective
            checkpointing, slow where every op asks it, is in a graph a mark on each op, and costs a step nothing.
    """
    for block in blocks:
        if mode == "full":
            block.forward = functools.partial(_checkpointed, block.forward)
        elif mode == "selective" and is_compiled:
            contexts = functools.partial(create_selective_checkpoint_contexts, _keep_the_costly)
            block.forward = functools.partial(_checkpointed, block.forward, context_fn=contexts)
        elif mode == "selective":
            block.forward = recipes_kept()(block.forward)


_checkpointed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def _keep_the_costly(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_costly(op) else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_costly(op: Any) -> bool:
    """Whether an op's time is worth its bytes: matrix products and attention, by every provider that is an op.

    Told by name: flash-attn's are registered when it is first imported. Its version 4 is no op, and is computed again.
    """
    return _COSTLY.fullmatch(op._schema.name) is not None
