"""The sum of squares of a list of tensors: what clipping by global norm needs from each rank.

    sum over tensors and entries of g^2

One square root after the sum over ranks gives the norm. Every tensor is reduced by itself in fp32, the tensors'
sums are added in fp64 in the order of the list, so the result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import use_reference


def grad_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


def grad_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all entries of all tensors (not its square root).

    Args:
        tensors: float tensors of any shape on one device, at least one; empty tensors count nothing.
    Returns:
        fp64 scalar on their device; infinite or NaN when an entry is, or when a tensor's norm exceeds fp32.
    Raises:
        ValueError: the list is empty.
    """
    if not tensors:
        raise ValueError("grad_norm needs at least one tensor")
    if use_reference():
        return grad_norm_reference(tensors)
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    return torch.stack(norms).double().square_().sum()
