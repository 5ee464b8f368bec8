"""Dropout: what it drops, what it keeps, and that nothing but its seed decides."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from kernels.dropout import dropout
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random


def seed(number: int = 7) -> torch.Tensor:
    return torch.tensor(number)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_a_share_is_dropped_and_the_rest_makes_up_for_it(p: float) -> None:
    x = random(300, 400).abs() + 1
    y = dropout(x, p, seed())
    dropped = y == 0
    # The number dropped of n is binomial; five standard deviations.
    assert abs(dropped.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / x.numel())
    assert torch.allclose(y[~dropped], (x / (1 - p))[~dropped])


def test_equal_seeds_drop_the_same_whatever_was_drawn_before() -> None:
    x = random(30, 40)
    first = dropout(x, 0.3, seed())
    torch.rand(5)
    assert torch.equal(dropout(x, 0.3, seed()), first)
    assert not torch.equal(dropout(x, 0.3, seed(8)), first)


def test_the_gradient_goes_where_the_input_went() -> None:
    x = random(30, 40).requires_grad_()
    y = dropout(x, 0.3, seed())
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx != 0, y != 0) and torch.allclose(dx[dx != 0], torch.tensor(1 / 0.7, device=DEVICE))
    assert gradcheck(lambda x: dropout(x, 0.3, seed()), (random(4, 5, dtype=torch.float64).requires_grad_(),))


def test_the_op_keeps_its_word_to_the_dispatcher() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.chimed.dropout.default, (random(8, 16).requires_grad_(), 0.25, seed()), test_utils=checks)
