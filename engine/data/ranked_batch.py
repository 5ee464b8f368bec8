"""The batch of everything that learns from comparisons: whole groups of answers to one prompt, packed.

A group is a prompt with K answers: K sequences, each the prompt's ids and an answer's up to and with its end token.
They lie one behind the other, so that one forward pass sees all answers to a prompt (Ouyang et al. 2022, section 3.5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.batch import PackedBatch


@dataclass(frozen=True)
class RankedBatch:
    """Sequences of whole groups. D is fixed for a run, as T is, so every shape is static.

    batch:     T tokens; targets are the ids of the compared answers alone (end tokens with them), of no earlier turn
    ends:      int64 [D], the index in `batch.tokens` of each sequence's last token, its end token; 0 behind them
    groups:    int64 [D], ascending: each sequence's group, counted from 0 within this batch; -1 behind them
    grades:    fp32 [D], higher is better; 0 behind them
    sequence:  int64 [D], each sequence's number among all of its `PreferenceSet`, to look up what was computed
               before; -1 behind them
    most_responses: no group has more sequences; the same for all batches of a set
    """

    batch: PackedBatch
    ends: Tensor
    groups: Tensor
    grades: Tensor
    sequence: Tensor
    most_responses: int

    @property
    def tokens(self) -> Tensor:
        """int64 [T]"""
        return self.batch.tokens

    @property
    def is_sequence(self) -> Tensor:
        """bool [D]"""
        return self.groups >= 0

    def to(self, device: torch.device | str) -> RankedBatch:
        """The same batch on another device; copies do not block the host when memory is pinned."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            batch=self.batch.to(device),
            ends=move(self.ends),
            groups=move(self.groups),
            grades=move(self.grades),
            sequence=move(self.sequence),
        )
