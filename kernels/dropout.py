"""Dropout whose mask is a function of a seed, so that it is drawn again instead of being kept.

    y = x m / (1 - p),      m independent, 1 with probability 1 - p        (Srivastava et al. 2014, section 4)

It is linear in x: the backward is the same op on the gradient, and nothing of the forward stays but the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import register_op
from kernels.recipes import offer_recipe


def _dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(int(seed))
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)
    return mask.mul_(x).div_(1 - p)


def _save(ctx, inputs, output) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _autograd(ctx, dy):
    (seed,) = ctx.saved_tensors
    return _dropout_op(dy, ctx.p, seed), None, None


_dropout_op = register_op(
    "dropout(Tensor x, float p, Tensor seed) -> Tensor",
    _dropout,
    lambda x, p, seed: torch.empty_like(x),
    setup_context=_save,
    backward=_autograd,
)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x with a share `p` of its numbers set to 0 and the others divided by 1 - p.

    Args:
        x: any shape, any float dtype.
        p: in [0, 1).
        seed: int64 scalar on the CPU. Equal seeds, shapes, dtypes and devices give equal masks.
    Returns:
        Shape and dtype of x.
    """
    y = _dropout_op(x, p, seed)
    offer_recipe((y,), _dropout_op, x, p, seed)
    return y
