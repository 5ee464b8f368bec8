"""NEFTune: noise on the embeddings of a fine-tuning run.                           (Jain et al. 2023, algorithm 1)

    x' = x + alpha / sqrt(L d) u,      u uniform in (-1, 1), independent in each of L x d coordinates

with L the tokens of the conversation and d the model's width. It is training's alone: nothing is judged or generated
with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from model.batch import PackedBatch


def neftune(alpha: float, width: int, seed: int, dtype: torch.dtype) -> Callable[[PackedBatch], Tensor]:
    """A function from a batch, on any device, to the noise on its embeddings: [T, d] in `dtype`.

    Each pack draws from a generator of its own, seeded by (seed, batch.index), so its noise does not depend on the
    number of ranks or on what was drawn before, and a resumed run draws it again.
    """

    def noise(batch: PackedBatch) -> Tensor:
        count, device = batch.tokens.numel(), batch.tokens.device
        digest = hashlib.blake2b(f"neftune {seed} {batch.index}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
        unit = torch.empty(count, width, dtype=dtype, device=device).uniform_(-1, 1, generator=generator)
        lengths = batch.cu_seqlens.diff()  # of no tokens too, behind the last
        scale = alpha * (lengths * width).rsqrt()
        return unit.mul_(scale.repeat_interleave(lengths, output_size=count).unsqueeze(1))

    return noise
