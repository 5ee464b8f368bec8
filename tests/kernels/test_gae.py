"""Advantages: the scan against the recurrence, closed forms, and trajectories that mind their own business."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from kernels import gae as estimation
from kernels.gae import BLOCK, gae, gae_reference
from tests.kernels.faces import DEVICE, each_face, faces, triton_face
from tests.kernels.oracle import assert_faithful, random

# Longer than a block of the scan, and as long as it; of lengths 0 and 1; prime.
SHORT = (5, 0, 1, 16, 17, 15, 0, 33, 1, 47)
coefficients = pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def actions(positions: int, seed: int = 7) -> Tensor:
    """Runs of a few actions, with gaps as between turns."""
    return random(positions // 3 + 1, seed=seed).repeat_interleave(3)[:positions] > -0.4


def problem(lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """rewards, values, cu_seqlens, action_mask, bootstrap"""
    positions = sum(lengths)
    rewards, values = random(positions, dtype=dtype), random(positions, seed=1, dtype=dtype)
    return rewards, values, bounds(*lengths), actions(positions), random(len(lengths), seed=2, dtype=dtype)


def assert_follows_the_recurrence(lengths: tuple[int, ...], dtype: torch.dtype, gamma: float, lam: float) -> None:
    rewards, values, cu_seqlens, mask, bootstrap = problem(lengths, dtype)
    fixed = {"cu_seqlens": cu_seqlens, "action_mask": mask, "gamma": gamma, "lam": lam}
    assert_faithful(
        lambda r, v, b: gae(r, v, bootstrap=b, **fixed),
        lambda r, v, b: gae_reference(r, v, bootstrap=b, **fixed),
        [rewards, values, bootstrap],
        has_gradients=False,
    )
    assert_faithful(
        partial(gae, **fixed), partial(gae_reference, bootstrap=None, **fixed), [rewards, values], has_gradients=False
    )


@faces
@coefficients
def test_gae_follows_the_recurrence(
    gamma: float, lam: float, face: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimation, "BLOCK", 16)
    assert_follows_the_recurrence(SHORT, dtype, gamma, lam)


@triton_face
def test_gae_follows_the_recurrence_at_the_edges_of_its_block(face: str, dtype: torch.dtype) -> None:
    assert_follows_the_recurrence((BLOCK - 1, BLOCK, BLOCK + 1), dtype, 0.99, 0.95)


@each_face
def test_one_step_at_lambda_0_is_the_temporal_difference(face: str) -> None:
    rewards, values, cu_seqlens, _, bootstrap = problem((4, 1, 0, 6))
    everywhere = torch.ones_like(rewards, dtype=torch.bool)
    advantages, returns = gae(rewards, values, cu_seqlens, everywhere, 0.9, 0.0, bootstrap)
    following = values.roll(-1)
    following[[3, 4, 10]] = bootstrap[[0, 1, 3]]
    torch.testing.assert_close(returns, rewards + 0.9 * following)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


@each_face
def test_returns_at_lambda_1_are_discounted_sums_of_rewards(face: str) -> None:
    length, gamma = 40, 0.95
    rewards, values, cu_seqlens, _, bootstrap = problem((length,))
    everywhere = torch.ones_like(rewards, dtype=torch.bool)
    _, returns = gae(rewards, values, cu_seqlens, everywhere, gamma, 1.0, bootstrap)
    powers = gamma ** torch.arange(length + 1, dtype=torch.float64, device=DEVICE)
    all_rewards = torch.cat((rewards, bootstrap)).double()
    expected = torch.stack([(powers[: length + 1 - t] * all_rewards[t:]).sum() for t in range(length)])
    torch.testing.assert_close(returns.double(), expected, rtol=1e-5, atol=1e-5)


@each_face
def test_every_advantage_is_the_score_when_nothing_is_discounted_or_expected(face: str) -> None:
    """A score on the last action, no value, gamma = lam = 1: exact, and nothing lands outside the actions."""
    cu_seqlens, mask = bounds(50, 1, 30), actions(81)
    mask[[49, 50, 78]] = True
    mask[79:] = False
    rewards = torch.zeros(81, device=DEVICE)
    rewards[[49, 50, 78]] = torch.tensor([0.7, -3.0, 1e-3], device=DEVICE)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), cu_seqlens, mask, 1.0, 1.0)
    scores = rewards[[49, 50, 78]].repeat_interleave(torch.tensor([50, 1, 30], device=DEVICE))
    assert torch.equal(advantages, scores.where(mask, 0))


@each_face
def test_positions_between_actions_are_as_if_they_were_not_there(face: str) -> None:
    rewards, values, cu_seqlens, mask, bootstrap = problem(SHORT)
    results = gae(rewards, values, cu_seqlens, mask, 0.9, 0.8, bootstrap)
    kept = torch.cat((mask.new_zeros(1), mask)).cumsum(0)[cu_seqlens.long()].int()
    alone = gae(rewards[mask], values[mask], kept, mask[mask], 0.9, 0.8, bootstrap)
    for with_gaps, without in zip(results, alone, strict=True):
        torch.testing.assert_close(with_gaps[mask], without)
        assert (with_gaps[~mask] == 0).all()


@each_face
def test_what_lies_outside_the_actions_is_never_read(face: str) -> None:
    rewards, values, cu_seqlens, mask, bootstrap = problem(SHORT)
    clean = gae(rewards, values, cu_seqlens, mask, 0.9, 0.8, bootstrap)
    for junk in (float("nan"), float("inf")):
        spoiled = gae(rewards.where(mask, junk), values.where(mask, junk), cu_seqlens, mask, 0.9, 0.8, bootstrap)
        assert all(torch.equal(a, b) for a, b in zip(clean, spoiled, strict=True))


@each_face
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_a_trajectory_gone_wrong_spoils_no_other(junk: float, face: str) -> None:
    rewards, values, cu_seqlens, mask, bootstrap = problem((30, 20, 30))
    clean = gae(rewards, values, cu_seqlens, mask, 0.9, 0.8, bootstrap)
    bad = rewards.clone()
    bad[30:50] = junk
    bootstrap[1] = junk
    spoiled = gae(bad, values, cu_seqlens, mask, 0.9, 0.8, bootstrap)
    for a, b in zip(clean, spoiled, strict=True):
        assert torch.equal(a[:30], b[:30]) and torch.equal(a[50:], b[50:])
        assert not b[30:50][mask[30:50]].isfinite().any()


@each_face
def test_a_trajectory_alone_and_packed_is_bitwise_the_same(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimation, "BLOCK", 16)
    rewards, values, cu_seqlens, mask, bootstrap = problem(SHORT)
    packed = gae(rewards, values, cu_seqlens, mask, 0.99, 0.95, bootstrap)
    for document, length in enumerate(SHORT):
        part = slice(cu_seqlens[document].item(), cu_seqlens[document + 1].item())
        own_bootstrap = bootstrap[document : document + 1]
        alone = gae(rewards[part], values[part], bounds(length), mask[part], 0.99, 0.95, own_bootstrap)
        assert all(torch.equal(a[part], b) for a, b in zip(packed, alone, strict=True))


@each_face
def test_there_may_be_no_actions_no_trajectories_or_positions_in_none(face: str) -> None:
    rewards, values, cu_seqlens, mask, _ = problem((6, 3))
    nothing = torch.zeros_like(rewards)
    for bound, actions_ in ((cu_seqlens, torch.zeros_like(mask)), (cu_seqlens[:1], ~nothing.bool())):
        assert all(torch.equal(x, nothing) for x in gae(rewards, values, bound, actions_, 0.9, 0.9))
    tail = gae(rewards, values, torch.tensor([0, 4, 4], dtype=torch.int32, device=DEVICE), ~nothing.bool(), 0.9, 0.9)
    assert all((x[:4] != 0).all() and (x[4:] == 0).all() for x in tail)
    assert all(x.shape == (0,) for x in gae(rewards[:0], values[:0], bounds(0, 0), mask[:0], 0.9, 0.9))


@each_face
def test_bounds_may_be_padded_with_the_number_of_positions(face: str) -> None:
    rewards, values, cu_seqlens, mask, bootstrap = problem((6, 30))
    padded = torch.cat((cu_seqlens, cu_seqlens[-1:].expand(3)))
    expected = gae(rewards, values, cu_seqlens, mask, 0.9, 0.9, bootstrap)
    results = gae(rewards, values, padded, mask, 0.9, 0.9, torch.cat((bootstrap, random(3, seed=5))))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@each_face
def test_strided_arguments_are_read_rightly(face: str) -> None:
    rewards, values, cu_seqlens, mask, bootstrap = problem((6, 30))
    strided = (torch.stack((x, x), dim=1)[:, 0] for x in (rewards, values, cu_seqlens, mask))
    expected = gae(rewards, values, cu_seqlens, mask, 0.9, 0.9, bootstrap)
    results = gae(*strided, 0.9, 0.9, torch.stack((bootstrap, bootstrap), dim=1)[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_the_op_keeps_its_word_to_the_dispatcher() -> None:
    *inputs, bootstrap = problem((5, 0, 3))
    for after in (None, bootstrap):
        opcheck(torch.ops.chimed.gae.default, (*inputs, after, 0.9, 0.8))


@each_face
def test_no_gradient_flows(face: str) -> None:
    rewards, values, cu_seqlens, mask, bootstrap = problem((5, 3))
    leaves = [x.requires_grad_() for x in (rewards, values, bootstrap)]
    results = gae(leaves[0], leaves[1], cu_seqlens, mask, 0.9, 0.9, leaves[2])
    assert not any(x.requires_grad for x in results)


def test_what_does_not_fit_is_refused() -> None:
    rewards, values, cu_seqlens, mask, bootstrap = problem((5, 3))
    for wrong in (
        (rewards, values[1:], cu_seqlens, mask),
        (rewards, values.half(), cu_seqlens, mask),
        (rewards, values, cu_seqlens, mask[1:]),
        (rewards, values, cu_seqlens, mask.int()),
        (rewards, values, cu_seqlens[:0], mask),
    ):
        with pytest.raises(ValueError, match="must be"):
            gae(*wrong, 0.9, 0.9)
    with pytest.raises(ValueError, match="2 trajectories"):
        gae(rewards, values, cu_seqlens, mask, 0.9, 0.9, bootstrap[:1])
    for gamma, lam in ((1.1, 0.9), (0.9, -0.1), (float("nan"), 0.9)):
        with pytest.raises(ValueError, match="gamma"):
            gae(rewards, values, cu_seqlens, mask, gamma, lam)
