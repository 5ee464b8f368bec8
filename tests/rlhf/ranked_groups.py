"""Batches of ranked answers without a model or tokens, for tests of what is computed from their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.data.ranked_batch import RankedBatch
from model.batch import IGNORE, PackedBatch


def ranked_groups(
    grades: Sequence[Sequence[float]], padding: int = 3, most_responses: int | None = None
) -> RankedBatch:
    """Groups with these grades, one token a sequence, and room for `padding` sequences more."""
    count = sum(map(len, grades))
    size = count + padding
    groups, flat = torch.full((size,), -1), torch.zeros(size)
    groups[:count] = torch.tensor([number for number, group in enumerate(grades) for _ in group])
    flat[:count] = torch.tensor([grade for group in grades for grade in group])
    ends, sequence = torch.zeros(size, dtype=torch.int64), torch.full((size,), -1)
    ends[:count] = sequence[:count] = torch.arange(count)
    bounds = torch.arange(size + 1, dtype=torch.int32)
    tokens = torch.zeros(size, dtype=torch.int64)
    batch = PackedBatch(tokens, tokens, bounds, torch.full((size,), IGNORE), count, 1)
    return RankedBatch(batch, ends, groups, flat, sequence, most_responses or max(map(len, grades)))
