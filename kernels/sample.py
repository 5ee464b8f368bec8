"""Draw a token from each row of logits, and say how likely it was.

    p = softmax(x / temperature),   token = argmax_i p_i / E_i,   E_i ~ Exp(1) independent

The arg-max is i with probability p_i: it is the Gumbel arg-max, of x_i / temperature - log E_i, with one logarithm
less. Noise for every column would cost more than reading the column does, so the race has two heats. A row is cut
into groups of GROUP columns; the least E_i / p_i of a group is itself exponential, with the sum of the group's p as
its rate. So one race among these sums chooses the group, and one among its columns the token: the same distribution.

E comes from Philox 4x32-10 (Salmon et al. 2011): the row's seed is the key, (place, step) the counter, and of the
four words two are for the group of that number, two for the column at that place of the chosen group. A token is a
function of its row's logits, temperature, seed and step. It does not depend on the batch, on the row's place in it,
or on how the work is split among programs, and both faces draw the same up to rounding.

    E = -log u,   u = (k + 1/2) / 2^52,   k made of 52 random bits

What is rare wins by a small E, by a u close to 1, where fp32 has no more numbers: 24 bits would cut chances off near
6e-8. In fp64 the least E is 2^-53, and a chance is right down to about 2^-52 in either heat.

Traffic for logits [B, V] of b bytes: BVb, each read once; 16 bytes of statistics a group; one group of each row again.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import accumulation_dtype, cdiv, launch, next_power_of_2, register_op, use_reference
from kernels.philox import philox, words

# Columns of a group. It decides which token a seed draws, so it is no tuning knob. Near the square root of a
# vocabulary of 150000, it keeps both heats short: noise for 512 places a row.
GROUP = 512
# Groups read by one program: 4096 columns are 8 to 16 KB, four to eight loads of 16 bytes a thread in flight.
GROUPS_PER_PROGRAM = 8

# Temperatures too small to divide by count as zero: those below the smallest normal number of fp32.
_SMALLEST = tl.constexpr(2.0**-126)
_LOG2_E = tl.constexpr(math.log2(math.e))


def exponential(high: Tensor, low: Tensor) -> Tensor:
    """Exp(1) in fp64 from two random words, 20 bits of the second."""
    return -(((high << 20 | low >> 12).double() + 0.5) * 2.0**-52).log()


def _noise(seeds: Tensor, step: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Exp(1) for groups and for columns, each [B, places]."""
    seeds, step = seeds.unsqueeze(1), step.unsqueeze(1)
    counter = torch.arange(places, device=seeds.device), torch.zeros_like(step), *words(step)
    word0, word1, word2, word3 = philox(counter, words(seeds))
    return exponential(word0, word1), exponential(word2, word3)


def sample_reference(
    logits: Tensor, seeds: Tensor, step: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Also the face for processors, where it takes hardly longer than its softmax."""
    x = logits.to(accumulation_dtype(logits.dtype))
    divisor = (x.new_full((len(x),), temperature) if temperatures is None else temperatures).unsqueeze(1)
    is_greedy = divisor < _SMALLEST.value
    logprobs = ((x - x.amax(dim=1, keepdim=True)) / divisor.where(~is_greedy, 1)).log_softmax(dim=1)
    token = x.argmax(dim=1, keepdim=True)
    # Where nobody draws, three quarters of the time would go into noise. A GPU is not asked: that would wait for it.
    if x.device.type != "cpu" or not is_greedy.all():
        token = token.where(is_greedy, _draw(logprobs.exp(), seeds, step))
    logprob = logprobs.gather(1, token)
    return token.where(~logprob.isnan(), 0).squeeze(1), logprob.squeeze(1)


def _draw(p: Tensor, seeds: Tensor, step: Tensor) -> Tensor:
    """A column of each row of probabilities p [B, V], int64 [B, 1]."""
    width = min(GROUP, p.shape[1])
    p = pad(p, (0, -p.shape[1] % width)).unflatten(1, (-1, width))  # [B, groups, width]
    groups = p.shape[1]
    for_groups, for_columns = _noise(seeds, step, max(groups, width))
    group = (p.sum(dim=2) / for_groups[:, :groups]).argmax(dim=1, keepdim=True)
    p = p.gather(1, group.unsqueeze(2).expand(-1, 1, width)).squeeze(1)
    return group * width + (p / for_columns[:, :width]).argmax(dim=1, keepdim=True)


@triton.jit
def _exponential(high, low):
    """Exp(1) from two random words."""
    k = (high.to(tl.uint64) << 20) | (low.to(tl.uint64) >> 12)
    return -tl.log((k.to(tl.float64) + 0.5) * 2.220446049250313e-16).to(tl.float32)


@triton.jit
def _divisor(temperatures_ptr, temperature, row):
    """(whether the row takes its likeliest token, what its logits are divided by)"""
    divisor = temperature if temperatures_ptr is None else tl.load(temperatures_ptr + row)
    is_greedy = divisor < _SMALLEST
    return is_greedy, tl.where(is_greedy, 1.0, divisor)


@triton.jit
def _sample_groups_kernel(
    logits_ptr,
    temperatures_ptr,
    temperature,
    statistics_ptr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    """Of each group: its largest logit, and the sum of its p, relative to that logit's."""
    programs: tl.constexpr = GROUPS // PER_PROGRAM
    row = tl.program_id(0).to(tl.int64) // programs
    group = tl.program_id(0) % programs * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    _, divisor = _divisor(temperatures_ptr, temperature, row)
    x = tl.load(logits_ptr + row * STRIDE + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, axis=1)
    origin = tl.where(peak == float("-inf"), 0.0, peak)  # nothing in the group can be drawn
    p = tl.exp2((x - origin[:, None]) * (_LOG2_E / divisor))
    peak_ptr = statistics_ptr + row * (2 * GROUPS)
    tl.store(peak_ptr + group, peak)
    tl.store(peak_ptr + GROUPS + group, tl.sum(p, axis=1))


@triton.jit
def _sample_draw_kernel(
    logits_ptr,
    temperatures_ptr,
    temperature,
    statistics_ptr,
    seeds_ptr,
    step_ptr,
    token_ptr,
    logprob_ptr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a row: the group that wins, the column that wins in it, and the logarithm of that column's p."""
    row = tl.program_id(0).to(tl.int64)
    seed, step = tl.load(seeds_ptr + row), tl.load(step_ptr + row * STEP_STRIDE)
    is_greedy, divisor = _divisor(temperatures_ptr, temperature, row)
    place = tl.arange(0, BLOCK)
    word0, word1, word2, word3 = tl.philox(seed, place, 0, step.to(tl.int32), (step >> 32).to(tl.int32))

    is_group = place < GROUPS
    peak_ptr = statistics_ptr + row * (2 * GROUPS)
    peak = tl.load(peak_ptr + place, mask=is_group, other=float("-inf"))
    top = tl.max(peak, axis=0)
    p = tl.load(peak_ptr + GROUPS + place, mask=is_group, other=0.0) * tl.exp2((peak - top) * (_LOG2_E / divisor))
    group = tl.argmax(tl.where(is_greedy, peak, p / _exponential(word0, word1)), axis=0)

    column = group * WIDTH + place
    is_column = (place < WIDTH) & (column < COLUMNS)
    x = tl.load(logits_ptr + row * STRIDE + column, mask=is_column, other=float("-inf")).to(tl.float32)
    relative_p = tl.exp2((x - tl.max(x, axis=0)) * (_LOG2_E / divisor))
    winner = tl.argmax(tl.where(is_greedy, x, relative_p / _exponential(word2, word3)), axis=0)

    drawn = tl.max(tl.where(place == winner, x, float("-inf")), axis=0)
    logprob = (drawn - top) / divisor - tl.log(tl.sum(p, axis=0))
    tl.store(token_ptr + row, tl.where(logprob == logprob, group * WIDTH + winner, 0))
    tl.store(logprob_ptr + row, logprob)


def _sample_triton(
    logits: Tensor, seeds: Tensor, step: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    rows, columns = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    programs = cdiv(columns, GROUP * GROUPS_PER_PROGRAM)
    groups = programs * GROUPS_PER_PROGRAM  # those past the end can never be drawn from
    statistics = logits.new_empty((rows, 2, groups), dtype=torch.float32)
    token, logprob = torch.empty_like(seeds), logits.new_empty(rows, dtype=torch.float32)
    # Compile-time, so that the compiler sees how rows are aligned: 50264 is a multiple of 8, not of 16.
    shape = {"COLUMNS": columns, "STRIDE": logits.stride(0), "GROUPS": groups, "WIDTH": GROUP, "num_warps": 4}
    source = logits, temperatures, temperature, statistics
    launch(_sample_groups_kernel, (rows * programs,), *source, PER_PROGRAM=GROUPS_PER_PROGRAM, **shape)
    shape |= {"STEP_STRIDE": step.stride(0), "BLOCK": max(GROUP, next_power_of_2(groups))}
    launch(_sample_draw_kernel, (rows,), *source, seeds, step, token, logprob, **shape)
    return token, logprob


def _fake(logits, seeds, step, temperatures, temperature):
    return torch.empty_like(seeds), logits.new_empty(len(logits), dtype=accumulation_dtype(logits.dtype))


_sample_op = register_op(
    "sample(Tensor logits, Tensor seeds, Tensor step, Tensor? temperatures, float temperature) -> (Tensor, Tensor)",
    sample_reference,
    _fake,
    triton=_sample_triton,
)


def sample(logits: Tensor, temperature: float | Tensor, seeds: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token from each row. Nothing waits for the device; there is no gradient.

    Args:
        logits: [B, V], any float dtype; rows may be strided, or one row repeated. Where -inf, never drawn.
        temperature: divides the logits; a finite number >= 0, or fp32 [B] of those. 0 takes the likeliest token.
        seeds: int64 [B]. Rows with one seed, step, temperature and logits draw one token.
        step: int64 [B] or [], such as the position to be filled: a seed makes new noise for every step.
    Returns:
        (token int64 [B], logprob [B] in fp32, or fp64 for fp64). logprob is the token's under the logits divided by
        the temperature, as `linear_logprob` gives it; at temperature 0, under the logits as they are. Ties go to
        the lowest index. A row without a distribution (with NaN or +inf, or all -inf) gives token 0, logprob NaN.
    Raises:
        ValueError: shapes or dtypes do not fit, V is 0, or a temperature number is negative or not finite.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits are {tuple(logits.shape)}; they must be [B, V] with V > 0")
    rows = logits.shape[:1]
    if seeds.shape != rows or seeds.dtype != torch.int64:
        raise ValueError(f"seeds are {tuple(seeds.shape)} {seeds.dtype}; they must be int64 {tuple(rows)}")
    if step.shape not in (rows, ()) or step.dtype != torch.int64:
        raise ValueError(f"step is {tuple(step.shape)} {step.dtype}; it must be int64 {tuple(rows)} or ()")
    temperatures = None
    if isinstance(temperature, Tensor):
        if temperature.shape != rows or temperature.dtype != torch.float32:
            shape = tuple(temperature.shape)
            raise ValueError(f"temperature is {shape} {temperature.dtype}; it must be a number or fp32 {tuple(rows)}")
        temperatures, temperature = temperature.contiguous(), 1.0
    elif not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be finite, and 0 or more")
    draw = sample_reference if use_reference() else _sample_op
    return draw(logits.detach(), seeds.contiguous(), step.expand(rows), temperatures, float(temperature))
