"""The one batch that every phase reads: a flat run of tokens holding whole documents, never padded apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.vocabulary import IGNORE as IGNORE


@dataclass(frozen=True)
class Layout:
    """Where documents begin and end, for queries and for keys.

    cu_seqlens_q, cu_seqlens_k: int32 [D+1], cumulative lengths; empty documents are allowed.
    max_q, max_k: upper bounds of the lengths, known without a device synchronisation.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class PackedBatch:
    """T tokens holding whole documents. T and D_max are fixed for a run, so every shape is static.

    tokens:     int64 [T]
    positions:  int64 [T], restarting at 0 with every document
    cu_seqlens: int32 [D_max+1], padded with T. Segments past `num_documents` are the tail that fills the
                pack; they are cut so that none is longer than `max_seqlen`.
    targets:    int64 [T], the next token of the same document, or IGNORE
    weights:    fp32 [T] or None: a factor for each target's loss
    num_documents: real documents, without the tail
    max_seqlen: the configured bound on a document's length, not the longest one present
    index: number of the pack among all packs of the run, whatever the number of ranks; -1 for one without documents
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    num_documents: int
    max_seqlen: int
    weights: Tensor | None = None
    index: int = 0

    @property
    def layout(self) -> Layout:
        return Layout(self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device; copies do not block the host when memory is pinned."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        weights = None if self.weights is None else move(self.weights)
        return replace(
            self,
            tokens=move(self.tokens),
            positions=move(self.positions),
            cu_seqlens=move(self.cu_seqlens),
            targets=move(self.targets),
            weights=weights,
        )
