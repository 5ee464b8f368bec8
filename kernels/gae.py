"""Generalised advantage estimation over packed trajectories.

    delta_k = r_k + gamma V_{k+1} - V_k,   A_k = delta_k + gamma lam A_{k+1}       (Schulman et al. 2016, eq. 16)

k counts the actions of one trajectory. Positions between two actions (what a user or a tool said) are transparent:
V_{k+1} and A_{k+1} are those of the next action, however far. After the last action V is the bootstrap value, or 0
where the trajectory is finished, and A is 0.

What an action needs from all that follows is one number. With the return R_k = A_k + V_k,

    R_k = r_k + gamma C_{k+1},   C_k = (1 - lam) V_k + lam R_k = ((1 - lam) V_k + lam r_k) + gamma lam C_{k+1}

so C, the value of what comes next, is a scan over the affine maps C_{k+1} -> C_k, and of these a position without an
action has the identity. Traffic: 17 bytes a position, read as itself and as a successor, and 8 of zeros before.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import accumulation_dtype, launch, register_op, use_reference

# Positions of one scan, on 4 warps. Fixed, so that a trajectory alone and packed has the same sums.
BLOCK = 1024


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    action_mask: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    rewards, values = (x.to(accumulation_dtype(x.dtype)) for x in (rewards, values))
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    bounds = cu_seqlens.tolist()
    for document, (start, end) in enumerate(pairwise(bounds)):
        next_value = values.new_zeros(()) if bootstrap is None else bootstrap[document].to(values.dtype)
        next_advantage = values.new_zeros(())
        for t in reversed(range(start, end)):
            if action_mask[t]:
                delta = rewards[t] + gamma * next_value - values[t]
                next_value, next_advantage = values[t], delta + gamma * lam * next_advantage
                advantages[t], returns[t] = next_advantage, next_advantage + values[t]
    return advantages, returns


@triton.jit
def _then(later_decay, later_value, decay, value):
    """The map of a position after the maps of all later ones."""
    return later_decay * decay, value + decay * later_value


@triton.jit
def _gae_kernel(
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    action_mask_ptr,
    bootstrap_ptr,
    advantages_ptr,
    returns_ptr,
    gamma,
    lam,
    one_minus_lam,
    decay,
    BLOCK: tl.constexpr,
):
    document = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + document).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + document + 1).to(tl.int64)
    after = 0.0 if bootstrap_ptr is None else tl.load(bootstrap_ptr + document).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    # Lanes run backwards through time, so that the scan runs forward.
    for seen in range(0, end - start, BLOCK):
        t = end - 1 - seen - lane
        successor = t + 1
        is_inside = (successor > start) & (successor < end)
        is_action = tl.load(action_mask_ptr + successor, mask=is_inside, other=0) != 0
        reward = tl.load(rewards_ptr + successor, mask=is_action, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + successor, mask=is_action, other=0.0).to(tl.float32)
        offset = one_minus_lam * value + lam * reward
        slope, offset = tl.associative_scan((tl.where(is_action, decay, 1.0), offset), 0, _then)
        following = offset + slope * after
        after = tl.sum(tl.where(lane == BLOCK - 1, following, 0.0), axis=0)

        is_inside = t >= start
        is_action = tl.load(action_mask_ptr + t, mask=is_inside, other=0) != 0
        reward = tl.load(rewards_ptr + t, mask=is_action, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + t, mask=is_action, other=0.0).to(tl.float32)
        result = tl.where(is_action, reward + gamma * following, 0.0)
        tl.store(returns_ptr + t, result, mask=is_inside)
        tl.store(advantages_ptr + t, result - value, mask=is_inside)


def _gae_triton(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    action_mask: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    # Zeros, for positions in no trajectory.
    advantages, returns = (torch.zeros_like(values, dtype=torch.float32) for _ in range(2))
    inputs = rewards, values, cu_seqlens, action_mask, bootstrap
    coefficients = gamma, lam, 1 - lam, gamma * lam
    grid = (len(cu_seqlens) - 1,)
    launch(_gae_kernel, grid, *inputs, advantages, returns, *coefficients, BLOCK=BLOCK, num_warps=4)
    return advantages, returns


def _gae_face(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    action_mask: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """The scan over all trajectories at once, by doubling how far a map reaches (Hillis & Steele 1986)."""
    wide, positions = accumulation_dtype(values.dtype), len(values)
    is_action = action_mask & (torch.arange(positions, device=values.device) < cu_seqlens[-1])
    reward, value = (x.to(wide).where(is_action, 0) for x in (rewards, values))
    # The map of every position's successor. A trajectory's last has the constant map instead, which separates it
    # from the next one; those of empty trajectories are put beyond the end.
    slope, offset = torch.where(is_action, gamma * lam, 1.0).to(wide), (1 - lam) * value + lam * reward
    slope, offset = (torch.cat((x[1:], x.new_zeros(2))) for x in (slope, offset))
    last = torch.where(cu_seqlens.diff() > 0, cu_seqlens[1:] - 1, positions).long()
    slope[last] = 0
    offset[last] = 0 if bootstrap is None else bootstrap.to(wide)
    reach = 1
    while reach < positions:
        ours = slope[:-reach]
        # Not 0 * x: what lies in another trajectory may be infinite.
        offset = torch.cat((offset[:-reach] + (ours * offset[reach:]).where(ours != 0, 0), offset[-reach:]))
        slope = torch.cat((ours * slope[reach:], slope[-reach:]))
        reach *= 2
    returns = (reward + gamma * offset[:positions]).where(is_action, 0)
    return returns - value, returns


def _fake(rewards, values, *_):
    wide = accumulation_dtype(values.dtype)
    return values.new_empty(values.shape, dtype=wide), values.new_empty(values.shape, dtype=wide)


_gae_op = register_op(
    "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor action_mask, Tensor? bootstrap,"
    " float gamma, float lam) -> (Tensor, Tensor)",
    _gae_face,
    _fake,
    triton=_gae_triton,
)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    action_mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed trajectories. They are constants: there is no gradient.

    Args:
        rewards: [T], any float dtype; what followed the action at each position.
        values: [T], dtype of rewards; of the state in which that action was taken.
        cu_seqlens: int32 [D + 1], from 0; trajectory d is positions cu_seqlens[d] up to cu_seqlens[d + 1].
        action_mask: bool [T]. Elsewhere rewards and values are never read; not even NaN there matters.
        gamma, lam: discount and decay, in [0, 1].
        bootstrap: [D], value of the state after the last action, for trajectories that were cut off; 0 if None.
    Returns:
        (advantages, returns), both [T] in fp32 (fp64 for fp64); 0 outside the action mask. returns is
        advantages + values.
    Raises:
        ValueError: shapes or dtypes do not fit, or gamma or lam is outside [0, 1].
    """
    length = rewards.shape
    if rewards.ndim != 1 or values.shape != length or action_mask.shape != length or values.dtype != rewards.dtype:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (rewards, values, action_mask))
        raise ValueError(
            f"rewards, values and action_mask are {shapes}; they must be [T], floats of one dtype and bool"
        )
    if action_mask.dtype != torch.bool:
        raise ValueError(f"action_mask is {action_mask.dtype}; it must be bool")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)}; it must be [D + 1]")
    if bootstrap is not None and bootstrap.shape != (len(cu_seqlens) - 1,):
        raise ValueError(f"bootstrap is {tuple(bootstrap.shape)}; there are {len(cu_seqlens) - 1} trajectories")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma is {gamma} and lam is {lam}; both must be in [0, 1]")
    rewards, values, cu_seqlens, action_mask = (
        x.detach().contiguous() for x in (rewards, values, cu_seqlens, action_mask)
    )
    bootstrap = None if bootstrap is None else bootstrap.detach().contiguous()
    estimate = gae_reference if use_reference() else _gae_op
    return estimate(rewards, values, cu_seqlens, action_mask, bootstrap, float(gamma), float(lam))
