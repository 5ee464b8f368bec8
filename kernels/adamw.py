"""AdamW over lists of tensors, in place.                                      (Loshchilov & Hutter 2019, alg. 2)

    g <- clip_scale * g
    m <- beta1 * m + (1 - beta1) * g
    v <- beta2 * v + (1 - beta2) * g^2
    p <- p - lr * weight_decay * p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

and nothing at all when should_skip != 0. Everything that the device decides (step, lr, clip_scale, should_skip)
is a tensor, so that the host never waits for it. Beside the fp32 masters p a bf16 shadow may be kept, written in the
same pass and rounded to nearest or at random.

Traffic for a parameter: p, m and v read and written and g read, 28 bytes in fp32, and 2 more for a shadow. One launch
covers all tensors (`kernels.tensor_list`). A thread has eight accesses of 16 bytes in flight, a multiprocessor of an
H200 with 1024 threads 128 KB of them; the latency of memory, some 700 ns, asks for 25 KB at 4.8 TB/s. At that speed a
multiprocessor has time for about 200 instructions a parameter: as compiled for sm_90 the update takes 47, with a
shadow 54, rounded at random 105.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, use_reference, use_triton
from kernels.rounding import nearest_bfloat16, stochastic_bfloat16, stochastic_bfloat16_reference
from kernels.tensor_list import (
    NUM_WARPS,
    TRITON_TYPES,
    address,
    address_table,
    block_ptr,
    chunk_table,
    load_chunk,
)

# Numbers of one block: 8 a thread, eight loads of 16 bytes in flight and 64 registers. Where numbers are not aligned
# each access has its own address, and only 2 a thread leave the registers to the others.
BLOCK, TAIL = 1024, 256

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
) -> None:
    beta1, beta2 = betas
    skip = should_skip != 0
    decays = _of_each(weight_decay, len(params))
    lr, clip_scale = lr.double(), clip_scale.double()  # scalars in fp64 leave tensors in their own dtype
    correction1, correction2 = (1 - beta ** step.double() for beta in betas)
    for param, grad, exp_avg, exp_avg_sq, decay in zip(params, grads, exp_avgs, exp_avg_sqs, decays, strict=True):
        g = grad.to(param.dtype) * clip_scale
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * g.square()
        update = (m / correction1) / ((v / correction2).sqrt() + eps)
        p = param * (1 - lr * decay) - lr * update
        for target, value in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
            target.copy_(torch.where(skip, target, value))
    _write_shadows(shadows, params, step, skip, rounding_seed)


def _of_each(weight_decay: float | Sequence[float], tensors: int) -> list[float]:
    return list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * tensors


def _write_shadows(shadows: Tensors | None, params: Tensors, step: Tensor, skip: Tensor, seed: int | None) -> None:
    place = 0
    for shadow, param in zip(shadows or (), params, strict=shadows is not None):
        if seed is None:
            rounded = param.bfloat16()
        else:
            rounded = stochastic_bfloat16_reference(param, seed, place, step)
        shadow.copy_(torch.where(skip, shadow, rounded))
        place += param.numel()


@triton.jit
def _lerp(a, b, weight):
    """(1 - weight) * a + weight * b. Two forms, so that the weight's rounding never multiplies the larger term."""
    return tl.where(weight < 0.5, tl.fma(weight, b - a, a), tl.fma(weight - 1.0, b - a, b))


@triton.jit
def _update_block(
    p_at, g_at, m_at, v_at, shadow_at, length, place,
    clip_scale, weight1, weight2, rate, decay, root_scale, eps, step, seed, position,
    GRAD: tl.constexpr, HAS_SHADOW: tl.constexpr, IS_STOCHASTIC: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a chunk; an aligned one is whole. All contractions are written out: both ways round alike."""
    p_ptr = block_ptr(p_at, position, tl.float32, VECTOR, BLOCK)
    g_ptr = block_ptr(g_at, position, GRAD, VECTOR, BLOCK)
    m_ptr = block_ptr(m_at, position, tl.float32, VECTOR, BLOCK)
    v_ptr = block_ptr(v_at, position, tl.float32, VECTOR, BLOCK)
    inside = None if VECTOR > 1 else position + tl.arange(0, BLOCK) < length
    p = tl.load(p_ptr, mask=inside)
    g = tl.load(g_ptr, mask=inside).to(tl.float32) * clip_scale
    m = _lerp(tl.load(m_ptr, mask=inside), g, weight1)
    v = _lerp(tl.load(v_ptr, mask=inside), g * g, weight2)
    update = tl.div_rn(rate * m, tl.fma(tl.sqrt_rn(v), root_scale, eps))
    p = p - tl.fma(decay, p, update)
    tl.store(p_ptr, p, mask=inside)
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    if HAS_SHADOW:
        if IS_STOCHASTIC:
            shadow = stochastic_bfloat16(p, seed, place + position + tl.arange(0, BLOCK), step)
        else:
            shadow = nearest_bfloat16(p)
        tl.store(block_ptr(shadow_at, position, tl.uint16, VECTOR, BLOCK), shadow, mask=inside)


@triton.jit(do_not_specialize=["tensors", "seed"])
def _adamw_kernel(
    chunks_ptr, addresses_ptr, weight_decay_ptr, lr_ptr, step_ptr, clip_scale_ptr, should_skip_ptr,
    tensors, weight1, weight2, log_beta1, log_beta2, eps, seed,
    GRAD: tl.constexpr, HAS_SHADOW: tl.constexpr, IS_STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    if tl.load(should_skip_ptr) != 0:
        return
    tensor, start, length, place = load_chunk(chunks_ptr)
    p_at = address(addresses_ptr, 0, tensors, tensor, start, tl.float32)
    g_at = address(addresses_ptr, 1, tensors, tensor, start, GRAD)
    m_at = address(addresses_ptr, 2, tensors, tensor, start, tl.float32)
    v_at = address(addresses_ptr, 3, tensors, tensor, start, tl.float32)
    shadow_at = p_at
    if HAS_SHADOW:
        shadow_at = address(addresses_ptr, 4, tensors, tensor, start, tl.uint16)
    is_aligned = (p_at | g_at | m_at | v_at | shadow_at) % 16 == 0
    whole = tl.where(is_aligned, length // BLOCK * BLOCK, 0)

    # 1 - beta^step in fp64: at step 1 of beta 0.999 all but three digits cancel.
    step = tl.load(step_ptr)
    lr = tl.load(lr_ptr).to(tl.float32)
    correction1 = 1 - tl.exp2(step.to(tl.float64) * log_beta1)
    correction2 = 1 - tl.exp2(step.to(tl.float64) * log_beta2)
    rate = (lr / correction1).to(tl.float32)
    root_scale = (1 / tl.sqrt(correction2)).to(tl.float32)
    decay = lr * tl.load(weight_decay_ptr + tensor)
    clip_scale = tl.load(clip_scale_ptr).to(tl.float32)

    chunk = p_at, g_at, m_at, v_at, shadow_at, length, place
    numbers = clip_scale, weight1, weight2, rate, decay, root_scale, eps, step, seed
    for position in range(0, whole, BLOCK):
        _update_block(*chunk, *numbers, position, GRAD, HAS_SHADOW, IS_STOCHASTIC, 4, BLOCK)
    for position in range(whole, length, TAIL):
        _update_block(*chunk, *numbers, position, GRAD, HAS_SHADOW, IS_STOCHASTIC, 1, TAIL)


@dataclass(frozen=True)
class _Call:
    """One call of `adamw`, in its own words; the decay of each tensor."""

    lists: list[Tensors]  # params, grads, exp_avgs, exp_avg_sqs, and shadows if there are any
    weight_decay: list[float]
    lr: Tensor
    betas: tuple[float, float]
    eps: float
    step: Tensor
    clip_scale: Tensor
    should_skip: Tensor
    rounding_seed: int | None


@functools.lru_cache(maxsize=16)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _adamw_triton(call: _Call) -> None:
    params, grads, *written = call.lists
    grads = list(map(Tensor.contiguous, grads))
    _check_memory(params, grads, written)
    device = params[0].device
    chunks = chunk_table(tuple(map(Tensor.numel, params)), device)
    addresses = address_table([params, grads, *written], device)
    decays = _on_device(tuple(call.weight_decay), device)
    weights = [1 - beta for beta in call.betas]
    logs = [math.log2(beta) if beta > 0 else -math.inf for beta in call.betas]
    launch(
        _adamw_kernel,
        (len(chunks),),
        *(chunks, addresses, decays, call.lr, call.step, call.clip_scale, call.should_skip),
        *(len(params), *weights, *logs, call.eps, call.rounding_seed or 0),
        GRAD=TRITON_TYPES[grads[0].dtype],
        HAS_SHADOW=len(call.lists) == 5,
        IS_STOCHASTIC=call.rounding_seed is not None,
        BLOCK=BLOCK,
        TAIL=TAIL,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def _check_memory(params: Tensors, grads: Tensors, written: Sequence[Tensors]) -> None:
    """What the kernel takes on trust, since addresses say nothing of it."""
    dtypes = [set(_dtypes(tensors)) for tensors in (params, grads, *written)]
    expected = [{torch.float32}, dtypes[1], {torch.float32}, {torch.float32}, {torch.bfloat16}]
    if dtypes != expected[: len(dtypes)] or len(dtypes[1]) > 1 or not dtypes[1] <= TRITON_TYPES.keys():
        raise ValueError(f"params and moments must be fp32, grads of one dtype, shadows bf16; these are {dtypes}")
    if not all(all(map(Tensor.is_contiguous, tensors)) for tensors in (params, *written)):
        raise ValueError("params, moments and shadows are written in place, so they must be contiguous")


def _adamw_torch(call: _Call) -> None:
    skip = call.should_skip != 0
    alike: dict[float, list[int]] = {}
    for index, decay in enumerate(call.weight_decay):
        alike.setdefault(decay, []).append(index)
    params, grads, exp_avgs, exp_avg_sqs, *shadows = call.lists
    for decay, indices in alike.items():
        torch._fused_adamw_(
            [params[i] for i in indices],
            [grads[i].to(params[i].dtype) for i in indices],
            [exp_avgs[i] for i in indices],
            [exp_avg_sqs[i] for i in indices],
            [],
            [call.step.float()] * len(indices),
            lr=call.lr,
            beta1=call.betas[0],
            beta2=call.betas[1],
            weight_decay=decay,
            eps=call.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=call.clip_scale.float().reciprocal(),  # torch divides by its scale
            found_inf=skip.float(),
        )
    for shadow in shadows:
        _write_shadows(shadow, params, call.step, skip, call.rounding_seed)


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
) -> None:
    """One step of AdamW on every tensor of the lists.

    Args:
        params, exp_avgs, exp_avg_sqs: contiguous fp32 tensors of any size and alignment, changed in place; under
            FSDP2 the local shards.
        grads: shapes of params, all fp32, all bf16 or all fp16. Scratch: they may hold clip_scale * grad afterwards.
        lr, step, clip_scale, should_skip: scalar tensors on the device of params. `step` is 1 for the first
            update; clip_scale is positive; a should_skip other than 0 leaves params, moments and shadows untouched.
        betas, eps: as in the formula above.
        weight_decay: for all tensors, or one for each.
        shadows: contiguous bf16 copies of params, overwritten with the new params, rounded to the nearest even.
        rounding_seed: from 0 to 2^63 - 1; shadows are then rounded up or down at random, to a number that depends
            on the seed, the step, and the place of the entry in the concatenation of params, and on nothing else.
    Raises:
        ValueError: lists of different length, tensors of different shape, or other dtypes than these.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ValueError(f"{len(params)} params, {len(grads)} grads, {len(exp_avgs)} and {len(exp_avg_sqs)} moments")
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([] if shadows is None else [shadows])]
    decays = _of_each(weight_decay, len(params))
    if len(lists[-1]) != len(params) or len(decays) != len(params):
        raise ValueError(f"{len(params)} params, {len(lists[-1])} shadows and {len(decays)} weight decays")
    if rounding_seed is not None and shadows is None:
        raise ValueError("rounding_seed is for shadows, and there are none")
    shapes = list(_shapes(params))
    if any(list(_shapes(tensors)) != shapes for tensors in lists[1:]):
        index, found = next((i, s) for i, s in enumerate(zip(*map(_shapes, lists), strict=True)) if len(set(s)) > 1)
        raise ValueError(f"tensor {index}: shapes differ: {[tuple(shape) for shape in found]}")
    if not params:
        return
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
        )
        return
    run = _adamw_triton if use_triton(params[0]) else _adamw_torch
    run(_Call(lists, decays, lr, betas, eps, step, clip_scale, should_skip, rounding_seed))
