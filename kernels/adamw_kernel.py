"""The Triton kernel of AdamW: one launch over lists of tensors, every number read once and written once.

A thread has 128 bytes of loads in flight, by 16 or 8 an access, a multiprocessor of an H200 with 1024 threads 128 KB;
the latency of memory, some 700 ns, asks for 25 KB at 4.8 TB/s. At that speed a multiprocessor has time for about 200
instructions a parameter: as compiled for sm_90 the update takes 47, with a shadow 54, rounded at random 105, and on
masters in two halves 55.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch
from kernels.masters import join_halves, split_halves
from kernels.rounding import nearest_bfloat16, stochastic_bfloat16
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

# What lies beside the other lists: shadows, rounded in one of two ways, or what bf16 params leave of fp32 masters.
Beside = Literal["nearest", "random", "remainder"]


@dataclass(frozen=True)
class Update:
    """One call of `adamw`, in its own words; the decay of each tensor."""

    lists: list[Sequence[Tensor]]  # params, grads, exp_avgs, exp_avg_sqs, and what is beside them
    beside: Beside | None
    weight_decay: list[float]
    lr: Tensor
    betas: tuple[float, float]
    eps: float
    step: Tensor
    clip_scale: Tensor
    should_skip: Tensor
    rounding_seed: int | None


@triton.jit
def _lerp(a, b, weight):
    """(1 - weight) * a + weight * b. Two forms, so that the weight's rounding never multiplies the larger term."""
    return tl.where(weight < 0.5, tl.fma(weight, b - a, a), tl.fma(weight - 1.0, b - a, b))


@triton.jit
def _update_block(
    p_at, g_at, m_at, v_at, beside_at, length, place,
    clip_scale, weight1, weight2, rate, decay, root_scale, eps, step, seed, position,
    PARAM: tl.constexpr, GRAD: tl.constexpr, BESIDE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a chunk; an aligned one is whole. All contractions are written out: both ways round alike."""
    p_ptr = block_ptr(p_at, position, PARAM, VECTOR, BLOCK)
    g_ptr = block_ptr(g_at, position, GRAD, VECTOR, BLOCK)
    m_ptr = block_ptr(m_at, position, tl.float32, VECTOR, BLOCK)
    v_ptr = block_ptr(v_at, position, tl.float32, VECTOR, BLOCK)
    beside_ptr = block_ptr(beside_at, position, tl.int16, VECTOR, BLOCK)
    inside = None if VECTOR > 1 else position + tl.arange(0, BLOCK) < length
    p = tl.load(p_ptr, mask=inside)
    if BESIDE == "remainder":
        p = join_halves(p, tl.load(beside_ptr, mask=inside))
    g = tl.load(g_ptr, mask=inside).to(tl.float32) * clip_scale
    m = _lerp(tl.load(m_ptr, mask=inside), g, weight1)
    v = _lerp(tl.load(v_ptr, mask=inside), g * g, weight2)
    update = tl.div_rn(rate * m, tl.fma(tl.sqrt_rn(v), root_scale, eps))
    p = p - tl.fma(decay, p, update)
    if BESIDE == "remainder":
        p, beside = split_halves(p)
    elif BESIDE == "random":
        beside = stochastic_bfloat16(p, seed, place + position + tl.arange(0, BLOCK), step)
    elif BESIDE == "nearest":
        beside = nearest_bfloat16(p)
    tl.store(p_ptr, p, mask=inside)
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    if BESIDE is not None:
        tl.store(beside_ptr, beside, mask=inside)


@triton.jit(do_not_specialize=["tensors", "seed"])
def _adamw_kernel(
    chunks_ptr, addresses_ptr, weight_decay_ptr, lr_ptr, step_ptr, clip_scale_ptr, should_skip_ptr,
    tensors, weight1, weight2, log_beta1, log_beta2, eps, seed,
    PARAM: tl.constexpr, GRAD: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    if tl.load(should_skip_ptr) != 0:
        return
    tensor, start, length, place = load_chunk(chunks_ptr)
    p_at = address(addresses_ptr, 0, tensors, tensor, start, PARAM)
    g_at = address(addresses_ptr, 1, tensors, tensor, start, GRAD)
    m_at = address(addresses_ptr, 2, tensors, tensor, start, tl.float32)
    v_at = address(addresses_ptr, 3, tensors, tensor, start, tl.float32)
    beside_at = p_at
    if BESIDE is not None:
        beside_at = address(addresses_ptr, 4, tensors, tensor, start, tl.int16)
    is_aligned = (p_at | g_at | m_at | v_at | beside_at) % 16 == 0
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

    chunk = p_at, g_at, m_at, v_at, beside_at, length, place
    numbers = clip_scale, weight1, weight2, rate, decay, root_scale, eps, step, seed
    for position in range(0, whole, BLOCK):
        _update_block(*chunk, *numbers, position, PARAM, GRAD, BESIDE, 4, BLOCK)
    for position in range(whole, length, TAIL):
        _update_block(*chunk, *numbers, position, PARAM, GRAD, BESIDE, 1, TAIL)


@functools.lru_cache(maxsize=16)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def update_in_one_launch(update: Update) -> None:
    """All tensors, whose shapes, dtypes and layouts have been checked."""
    params, grads, *written = update.lists
    grads = list(map(Tensor.contiguous, grads))
    device = params[0].device
    chunks = chunk_table(tuple(map(Tensor.numel, params)), device)
    addresses = address_table([params, grads, *written], device)
    decays = _on_device(tuple(update.weight_decay), device)
    weights = [1 - beta for beta in update.betas]
    logs = [math.log2(beta) if beta > 0 else -math.inf for beta in update.betas]
    launch(
        _adamw_kernel,
        (len(chunks),),
        *(chunks, addresses, decays, update.lr, update.step, update.clip_scale, update.should_skip),
        *(len(params), *weights, *logs, update.eps, update.rounding_seed or 0),
        PARAM=tl.int16 if update.beside == "remainder" else tl.float32,
        GRAD=TRITON_TYPES[grads[0].dtype],
        BESIDE=update.beside,
        BLOCK=BLOCK,
        TAIL=TAIL,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
