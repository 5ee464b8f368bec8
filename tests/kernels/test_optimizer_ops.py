"""AdamW and the sum of squares, against float64 and against torch's own optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adamw import adamw, adamw_reference
from kernels.grad_norm import grad_norm
from tests.kernels.oracle import random

SHAPES = [(5, 7), (130,), (1,), (0, 4), (64, 33)]
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def state(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """params, grads, exp_avgs, exp_avg_sqs"""
    lists = [[random(*shape, seed=10 * k + i) for i, shape in enumerate(SHAPES)] for k in range(4)]
    lists[3] = [x.square() for x in lists[3]]
    return [[x.to(dtype) for x in tensors] for tensors in lists]


def scalars(step: int = 3, clip_scale: float = 0.37, should_skip: int = 0) -> dict[str, Tensor]:
    return {
        "lr": torch.tensor(1e-2),
        "step": torch.tensor(step),
        "clip_scale": torch.tensor(clip_scale),
        "should_skip": torch.tensor(should_skip),
    }


def test_adamw_is_as_close_to_float64_as_the_reference_is() -> None:
    ours, plain, truth = state(), state(), state(torch.float64)
    for step in range(1, 6):
        for index, tensors in enumerate((ours, plain, truth)):
            tensors[1] = [random(*shape, seed=step).to(tensors[0][0].dtype) for shape in SHAPES]
            run = adamw if index == 0 else adamw_reference
            run(*tensors, **OPTIONS, **scalars(step))
    for k in (0, 2, 3):
        for a, b, true in zip(ours[k], plain[k], truth[k], strict=True):
            if true.numel():
                allowed = 2 * (b.double() - true).abs().max() + 4 * torch.finfo(a.dtype).eps * true.abs().max()
                assert (a.double() - true).abs().max() <= allowed


def test_adamw_is_torchs_own_adamw() -> None:
    params, _, _, _ = state(torch.float64)
    theirs = [torch.nn.Parameter(x.clone()) for x in params]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, **OPTIONS)
    moments = [[torch.zeros_like(x) for x in params] for _ in range(2)]
    for step in range(1, 4):
        grads = [random(*shape, seed=step).double() for shape in SHAPES]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        adamw_reference(params, grads, *moments, **OPTIONS, **scalars(step, clip_scale=1.0))
    # The rate is given as fp32 here and as a Python number there.
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(params, theirs, strict=True))


@pytest.mark.parametrize("gradient", [1.0, float("nan"), float("inf")])
def test_a_skipped_step_changes_nothing_whatever_the_gradients_hold(gradient: float) -> None:
    for run in (adamw, adamw_reference):
        tensors = state()
        tensors[1] = [torch.full_like(x, gradient) for x in tensors[0]]
        before = [[x.clone() for x in tensors[k]] for k in (0, 2, 3)]
        run(*tensors, **OPTIONS, **scalars(clip_scale=gradient, should_skip=1))
        for old, k in zip(before, (0, 2, 3), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(old, tensors[k], strict=True))


def test_adamw_refuses_lists_that_do_not_fit() -> None:
    params, grads, first, second = state()
    with pytest.raises(ValueError, match="4 grads"):
        adamw(params, grads[:4], first, second, **OPTIONS, **scalars())
    with pytest.raises(ValueError, match="tensor 1"):
        adamw(params[:2], [grads[0], grads[0]], first[:2], second[:2], **OPTIONS, **scalars())


def test_an_empty_list_is_no_work() -> None:
    given = scalars()
    adamw([], [], [], [], **OPTIONS, **given)
    assert all(torch.equal(given[name], value) for name, value in scalars().items())


def test_grad_norm_is_the_sum_of_squares() -> None:
    tensors = [random(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    true = sum(x.double().square().sum() for x in tensors)
    result = grad_norm(tensors)
    assert result.dtype == torch.float64 and result.shape == ()
    # A norm in fp32 over n entries errs by a few units in the last place; squaring doubles that.
    assert abs(result - true) <= 8 * torch.finfo(torch.float32).eps * true


def test_grad_norm_sees_values_that_are_not_finite() -> None:
    assert grad_norm([torch.ones(3), torch.tensor([1.0, float("inf")])]).isinf()
    assert grad_norm([torch.tensor([float("nan")]), torch.ones(3)]).isnan()


def test_grad_norm_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        grad_norm([])
