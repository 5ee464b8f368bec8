"""Recipes in place of results: the same bits in the backward pass, and nothing kept that need not be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from kernels import recipes
from kernels.dropout import dropout
from kernels.linear import linear
from kernels.low_rank import low_rank_linear
from kernels.recipes import recipes_kept
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import rotary
from kernels.swiglu import swiglu
from tests.kernels.faces import DEVICE, each_face
from tests.kernels.oracle import random

POSITIONS = torch.arange(8, device=DEVICE)
TABLE = random(8, 8, seed=9)
SEED = torch.tensor(7)

Made = Callable[[Tensor, Tensor], Tensor]


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).requires_grad_()


# What a product may read, made of x [8, 64] and norm [64].
MADE: dict[str, Made] = {
    "norm": lambda x, norm: rms_norm(x, norm, 1e-6),
    "norm after a sum": lambda x, norm: add_rms_norm(x, x, norm, 1e-6)[0],
    "activation": lambda x, norm: swiglu(torch.cat((x * norm, x), dim=1)),
    "dropout of a norm": lambda x, norm: dropout(rms_norm(x, norm, 1e-6), 0.5, SEED),
    "dropout of an activation": lambda x, norm: dropout(swiglu(torch.cat((x * norm, x), dim=1)), 0.5, SEED),
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": linear,
    "torch's": lambda x, weight: F.linear(x, weight, weight[0]),
    "adapters": lambda x, weight: low_rank_linear(
        x, weight.detach(), None, weight[:4], weight[:, :2], 0.5, (40, 24), dropped=dropout(x, 0.5, SEED)
    ),
}
made = pytest.mark.parametrize("made", MADE.values(), ids=MADE)


@each_face
@made
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_gradients_are_the_same_bits(made: Made, product: Callable[[Tensor, Tensor], Tensor], face: str) -> None:
    inputs = [leaf(8, 64), leaf(64, seed=2), leaf(64, 64, seed=1)]
    x, norm, weight = inputs

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(product(made(x, norm), weight).square().sum(), inputs)

    kept = gradients()
    with recipes_kept():
        made_again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(kept, made_again, strict=True))


@pytest.mark.parametrize("is_kept", [True, False])
@made
def test_what_a_product_reads_is_let_go(made: Made, is_kept: bool) -> None:
    x, norm, weight = leaf(8, 64), leaf(64, seed=2), leaf(64, 64, seed=1)
    with nullcontext() if is_kept else recipes_kept():
        read = made(x, norm)
        storage = StorageWeakRef(read.untyped_storage())
        y = linear(read, weight)
        del read
    assert storage.expired() != is_kept
    y.sum().backward()


def test_a_result_that_no_gradient_reaches_stays_instead_of_what_it_is_made_of() -> None:
    gate_up, weight = random(8, 128), leaf(64, 64, seed=1)
    storage = StorageWeakRef(gate_up.untyped_storage())
    with recipes_kept():
        y = linear(swiglu(gate_up), weight)
    del gate_up
    assert storage.expired()
    y.sum().backward()


class Reader(torch.autograd.Function):
    """Keeps two tensors, as attention keeps queries and keys."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return q.sum() + k.sum()

    @staticmethod
    def backward(ctx, dy):
        q, k = ctx.saved_tensors
        return dy * q.square(), dy * k


def test_results_of_one_op_are_computed_once_for_all_and_anew_for_a_second_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    followed = []
    follow = recipes._Recipe.follow

    def counted(recipe: recipes._Recipe, index: int) -> Tensor:
        if index not in recipe.waiting:
            followed.append(recipe.op.registered._opname)
        return follow(recipe, index)

    monkeypatch.setattr(recipes._Recipe, "follow", counted)
    q, k, norm = leaf(8, 4, 16), leaf(8, 2, 16, seed=1), leaf(16, seed=2)

    def loss() -> Tensor:
        turned = rotary(rms_norm(q, norm, 1e-6), rms_norm(k, norm, 1e-6), POSITIONS, TABLE, TABLE)
        return Reader.apply(*turned)

    kept = torch.autograd.grad(loss(), (q, k, norm))
    with recipes_kept():
        recomputed = loss()
    for _ in range(2):
        gradients = torch.autograd.grad(recomputed, (q, k, norm), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(kept, gradients, strict=True))
        assert sorted(followed) == ["rms_norm", "rms_norm", "rotary"]
        followed.clear()


def test_a_graph_that_is_dropped_takes_what_it_kept_with_it() -> None:
    """An op that saves its own result must not hold itself."""
    x = leaf(8, 64)
    with recipes_kept():
        y = torch.exp(rms_norm(x, random(64, seed=2), 1e-6))
    storage = StorageWeakRef(y.untyped_storage())
    del y
    assert storage.expired()


def test_outside_nothing_is_noted() -> None:
    assert not hasattr(rms_norm(leaf(8, 64), random(64), 1e-6), "_recipe")
    with pytest.raises(ZeroDivisionError), recipes_kept():
        raise ZeroDivisionError
    assert not hasattr(rms_norm(leaf(8, 64), random(64), 1e-6), "_recipe")
