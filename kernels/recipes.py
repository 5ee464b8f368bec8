"""Results that the backward pass computes again, from what is kept anyway.

A product keeps its input for the gradient of its weight. Where that input is the result of an op that streams memory
(a norm, a rotation, an activation, dropout), and the op's own inputs are kept for its own backward, the product can do
without: within `recipes_kept` autograd saves a recipe in the result's place, the op and what it reads, and follows it
when the product's backward asks. The op runs again on the same numbers, so its result is the same to the bit.

It works through autograd's hooks for saved tensors, below which it does not matter who saves: torch's own products,
ours, those with adapters. A fused norm-and-product op would keep as little, but it would take one for every pair of
a norm or activation with a kind of product. Who keeps a view of a result keeps all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_are_kept = False


class _Recipe:
    """The first results of an op, to be computed from its inputs: tensors, results of other recipes, and numbers."""

    def __init__(self, op: Callable[..., Any], inputs: tuple[Any, ...], count: int) -> None:
        self.op, self.count = op, count
        self.inputs = [getattr(x, "_recipe", x) for x in inputs]
        self.waiting: dict[int, Tensor] = {}

    def follow(self, index: int) -> Tensor:
        """One result. What is computed beside it waits to be asked for, once."""
        if index not in self.waiting:
            made = self.op(*map(_unpack, self.inputs))
            self.waiting = dict(enumerate(made[: self.count] if isinstance(made, tuple) else (made,)))
        return self.waiting.pop(index)


def offer_recipe(results: tuple[Tensor, ...], op: Callable[..., Any], *inputs: Any) -> None:
    """Say how results of an op that wrote them are computed again. Without effect outside of `recipes_kept`.

    Args:
        results: those of a call of the op, or the first of them.
        op: `op(*inputs)` gives them to the bit, and others behind them, and keeps nothing when gradients are off.
    """
    # Without a gradient the op keeps no input, which may be larger than the result.
    if _are_kept and results[0].requires_grad:
        recipe = _Recipe(op, inputs, len(results))
        for index, result in enumerate(results):
            result._recipe = recipe, index  # type: ignore[attr-defined]


@contextmanager
def recipes_kept() -> Iterator[None]:
    """Within the context, what is saved for the backward pass is a recipe where there is one. Not for torch.compile."""
    global _are_kept
    before, _are_kept = _are_kept, True
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _are_kept = before


def _pack(x: Tensor) -> Any:
    # A result of the op that saves it would hold the op's place in the graph, and that the result.
    return getattr(x, "_recipe", None) or x.detach()


def _unpack(kept: Any) -> Any:
    if isinstance(kept, tuple):
        recipe, index = kept
        return recipe.follow(index)
    return kept
