"""AdamW over lists of tensors, in place.                                      (Loshchilov & Hutter 2019, alg. 2)

    g <- clip_scale * g
    m <- beta1 * m + (1 - beta1) * g
    v <- beta2 * v + (1 - beta2) * g^2
    p <- p - lr * weight_decay * p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

and nothing at all when should_skip != 0. Everything that the device decides (step, lr, clip_scale, should_skip)
is a tensor, so that the host never waits for it. Beside the fp32 masters p a bf16 shadow may be kept, written in the
same pass and rounded to nearest or at random.

Traffic for a parameter: p, m and v read and written and g read, 28 bytes in fp32, and 2 more for a shadow. Masters in
two halves (`kernels.masters`) move the 28 bytes alone, and the half that products read is there without a shadow. On a
GPU one launch covers all tensors (`kernels.adamw_kernel`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from kernels.adamw_kernel import Beside, Update, update_in_one_launch
from kernels.backend import use_reference, use_triton
from kernels.masters import join_master, split_master
from kernels.rounding import stochastic_bfloat16_reference
from kernels.tensor_list import TRITON_TYPES

Tensors = Sequence[Tensor]
_shapes, _dtypes = (functools.partial(map, attrgetter(name)) for name in ("shape", "dtype"))


def adamw_reference(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    step: Tensor,
    clip_scale: Tensor,
    should_skip: Tensor,
    shadows: Tensors | None = None,
    rounding_seed: int | None = None,
    remainders: Tensors | None = None,
) -> None:
    beta1, beta2 = betas
    skip = should_skip != 0
    decays = _of_each(weight_decay, len(params))
    lr, clip_scale = lr.double(), clip_scale.double()  # scalars in fp64 leave tensors in their own dtype
    correction1, correction2 = (1 - beta ** step.double() for beta in betas)
    lists = params, grads, exp_avgs, exp_avg_sqs, decays, remainders or [None] * len(params)
    for param, grad, exp_avg, exp_avg_sq, decay, remainder in zip(*lists, strict=True):
        master = param if remainder is None else join_master(param, remainder)
        g = grad.to(master.dtype) * clip_scale
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * g.square()
        update = (m / correction1) / ((v / correction2).sqrt() + eps)
        p = master * (1 - lr * decay) - lr * update
        _replace((exp_avg, exp_avg_sq), (m, v), skip)
        if remainder is None:
            _replace((param,), (p,), skip)
        else:
            _replace((param, remainder), split_master(p.float()), skip)
    _write_shadows(shadows, params, step, skip, rounding_seed)


def _replace(targets: Tensors, values: Tensors, skip: Tensor) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(torch.where(skip, target, value))


def _of_each(weight_decay: float | Sequence[float], tensors: int) -> list[float]:
    return list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * tensors


def _write_shadows(shadows: Tensors | None, params: Tensors, step: Tensor, skip: Tensor, seed: int | None) -> None:
    place = 0
    for shadow, param in zip(shadows or (), params, strict=shadows is not None):
        if seed is None:
            rounded = param.bfloat16()
        else:
            rounded = stochastic_bfloat16_reference(param, seed, place, step)
        _replace((shadow,), (rounded,), skip)
        place += param.numel()


def _check_memory(lists: list[Tensors], beside: Beside | None) -> None:
    """What is taken on trust afterwards, since addresses say nothing of it, nor do the bits of a half."""
    dtypes = [set(_dtypes(tensors)) for tensors in lists]
    param, other = (torch.bfloat16, torch.int16) if beside == "remainder" else (torch.float32, torch.bfloat16)
    expected = [{param}, dtypes[1], {torch.float32}, {torch.float32}, {other}]
    if dtypes != expected[: len(dtypes)] or len(dtypes[1]) > 1 or not dtypes[1] <= TRITON_TYPES.keys():
        wanted = "params bf16, remainders int16" if beside == "remainder" else "params fp32, shadows bf16"
        raise ValueError(f"moments must be fp32, grads of one dtype, {wanted}; these are {dtypes}")
    params, _, *written = lists
    if not all(all(map(Tensor.is_contiguous, tensors)) for tensors in (params, *written)):
        raise ValueError("params, moments, shadows and remainders are written in place, so they must be contiguous")


def _adamw_torch(update: Update) -> None:
    if update.beside == "remainder":
        for index, decay in enumerate(update.weight_decay):
            _update_halves([tensors[index] for tensors in update.lists], decay, update)
        return
    lists, shadows = update.lists[:4], update.lists[4:]
    alike: dict[float, list[int]] = {}
    for index, decay in enumerate(update.weight_decay):
        alike.setdefault(decay, []).append(index)
    for decay, indices in alike.items():
        _update_alike([[tensors[i] for i in indices] for tensors in lists], decay, update)
    for shadow in shadows:
        _write_shadows(shadow, lists[0], update.step, update.should_skip != 0, update.rounding_seed)


def _update_halves(tensors: Tensors, weight_decay: float, update: Update) -> None:
    """One tensor of each list, since the masters of all params would be a second copy of the weights."""
    param, *grad_and_moments, remainder = tensors
    master = join_master(param, remainder)
    _update_alike([[master], *([x] for x in grad_and_moments)], weight_decay, update)
    _replace((param, remainder), split_master(master), update.should_skip != 0)


def _update_alike(lists: list[list[Tensor]], weight_decay: float, update: Update) -> None:
    params, grads, exp_avgs, exp_avg_sqs = lists
    torch._fused_adamw_(
        params,
        [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)],
        exp_avgs,
        exp_avg_sqs,
        [],
        [update.step.float()] * len(params),
        lr=update.lr,
        beta1=update.betas[0],
        beta2=update.betas[1],
        weight_decay=weight_decay,
        eps=update.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=update.clip_scale.float().reciprocal(),  # torch divides by its scale
        found_inf=(update.should_skip != 0).float(),
    )


@torch.no_grad()
def adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    step: Tensor,
    clip_scale: Tensor,
    should_skip: Tensor,
    shadows: Tensors | None = None,
    rounding_seed: int | None = None,
    remainders: Tensors | None = None,
) -> None:
    """One step of AdamW on every tensor of the lists.

    Args:
        params, exp_avgs, exp_avg_sqs: contiguous fp32 tensors of any size and alignment, changed in place; under
            FSDP2 the local shards. With remainders params are bf16.
        grads: shapes of params, all fp32, all bf16 or all fp16. Scratch: they may hold clip_scale * grad afterwards.
        lr, step, clip_scale, should_skip: scalar tensors on the device of params. `step` is 1 for the first
            update; clip_scale is positive; a should_skip other than 0 leaves all that is written untouched.
        betas, eps: as in the formula above.
        weight_decay: for all tensors, or one for each.
        shadows: contiguous bf16 copies of params, overwritten with the new params, rounded to the nearest even.
        rounding_seed: from 0 to 2^63 - 1; shadows are then rounded up or down at random, to a number that depends
            on the seed, the step, and the place of the entry in the concatenation of params, and on nothing else.
        remainders: contiguous int16 tensors that with the bf16 params are the fp32 masters (`kernels.masters`). Both
            are changed in place, to the halves of what the masters would become as fp32 params. Not beside shadows.
    Raises:
        ValueError: lists of different length, tensors of different shape, or other dtypes than these.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ValueError(f"{len(params)} params, {len(grads)} grads, {len(exp_avgs)} and {len(exp_avg_sqs)} moments")
    if remainders is not None and (shadows is not None or rounding_seed is not None):
        raise ValueError("beside remainders params are bf16 already, so neither shadows nor a rounding_seed is wanted")
    if rounding_seed is not None and shadows is None:
        raise ValueError("rounding_seed is for shadows, and there are none")
    lists = [params, grads, exp_avgs, exp_avg_sqs, *(x for x in (shadows, remainders) if x is not None)]
    decays = _of_each(weight_decay, len(params))
    if len(lists[-1]) != len(params) or len(decays) != len(params):
        name = "shadows" if remainders is None else "remainders"
        raise ValueError(f"{len(params)} params, {len(lists[-1])} {name} and {len(decays)} weight decays")
    shapes = list(_shapes(params))
    if any(list(_shapes(tensors)) != shapes for tensors in lists[1:]):
        index, found = next((i, s) for i, s in enumerate(zip(*map(_shapes, lists), strict=True)) if len(set(s)) > 1)
        raise ValueError(f"tensor {index}: shapes differ: {[tuple(shape) for shape in found]}")
    if not params:
        return
    beside: Beside | None = None
    if remainders is not None:
        beside = "remainder"
    elif shadows is not None:
        beside = "nearest" if rounding_seed is None else "random"
    if beside == "remainder" or use_triton(params[0]):
        _check_memory(lists, beside)
    if use_reference():
        adamw_reference(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=decays,
            step=step,
            clip_scale=clip_scale,
            should_skip=should_skip,
            shadows=shadows,
            rounding_seed=rounding_seed,
            remainders=remainders,
        )
        return
    run = update_in_one_launch if use_triton(params[0]) else _adamw_torch
    run(Update(lists, beside, decays, lr, betas, eps, step, clip_scale, should_skip, rounding_seed))
