"""What Triton programs do to logits: a row's statistics in one read, and the gradient that they lead to.

    z = x / temperature,   lse = log sum exp z,   p = exp(z - lse)
    dz = slope p + curve p log p + at_target onehot(target)

Every gradient of the ops on a head has this form, with three numbers a row. It is formed in fp32 and rounded once,
p - 1 at the target included.

A row is read in tiles of ROUNDS x LANES neighbouring columns. A lane sees every LANES-th column and keeps its own
running peak and sums, so nothing crosses threads before the end of the row, and there are 1 + 1/ROUNDS exponentials
a column. How a row is cut depends on its length alone: its results are bitwise the same in any batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import next_power_of_2

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
# Below any logit, yet finite, so that differences with it are numbers.
_FLOOR = tl.constexpr(-1e38)


@triton.jit
def _add_tile(x, peak, total, moment, scale, WITH_MOMENT: tl.constexpr):
    higher = tl.maximum(peak, tl.max(x, axis=0))
    shrink = tl.exp2((peak - higher) * scale)
    below = x - higher[None, :]
    e = tl.exp2(below * scale)
    if WITH_MOMENT:
        moment = (moment + (peak - higher) * total) * shrink + tl.sum(below * e, axis=0)
    return higher, total * shrink + tl.sum(e, axis=0), moment


@triton.jit
def row_statistics(
    row_ptr,
    inverse_temperature,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_MOMENT: tl.constexpr,
):
    """(peak = max x, log of total, moment / total) of a row, fp32.

    total = sum exp((x - peak) / temperature) and moment = sum (x - peak) exp((x - peak) / temperature), so that

        lse     = peak / temperature + log total
        entropy = log total - moment / total / temperature
    """
    TILE: tl.constexpr = ROUNDS * LANES
    WHOLE: tl.constexpr = COLUMNS // TILE * TILE
    scale = inverse_temperature * _LOG2_E
    place = tl.arange(0, ROUNDS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peak = tl.full((LANES,), _FLOOR, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    for start in tl.range(0, WHOLE, TILE, num_stages=STAGES):
        x = tl.load(row_ptr + start + place).to(tl.float32)
        peak, total, moment = _add_tile(x, peak, total, moment, scale, WITH_MOMENT)
    if WHOLE < COLUMNS:
        is_column = WHOLE + place < COLUMNS
        x = tl.load(row_ptr + WHOLE + place, mask=is_column, other=0.0).to(tl.float32)
        x = tl.where(is_column, x, _FLOOR)
        peak, total, moment = _add_tile(x, peak, total, moment, scale, WITH_MOMENT)
    # A lane without a column has counted the floor, which is nothing beside any peak.
    highest = tl.max(peak, axis=0)
    shrink = tl.exp2((peak - highest) * scale)
    whole = tl.sum(total * shrink, axis=0)
    log_total = tl.log2(whole) * _LN_2
    mean = 0.0
    if WITH_MOMENT:
        mean = tl.sum((moment + (peak - highest) * total) * shrink, axis=0) / whole
    return highest, log_total, mean


@triton.jit
def target_logit(row_ptr, target, COLUMNS: tl.constexpr):
    """x[target], fp32. A target outside the vocabulary gives NaN: nobody could miss it, nor read beyond the row."""
    is_column = (target >= 0) & (target < COLUMNS)
    return tl.load(row_ptr + target, mask=is_column, other=float("nan")).to(tl.float32)


@triton.jit
def gradient(log_p, is_target, slope, curve, at_target, HAS_CURVE: tl.constexpr):
    """dz of a tile, from log p. Without HAS_CURVE, curve is not looked at."""
    if HAS_CURVE:
        slope += curve * log_p
    return tl.exp2(log_p * _LOG2_E) * slope + tl.where(is_target, at_target, 0.0)


def row_options(columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Lanes, rounds and warps for programs that walk along a row.

    A lane is a 16-byte load of a thread, and a tile four of them: 16 KB for 8 warps. Three stages keep two tiles on
    their way while one is worked on, so the two or more programs that a multiprocessor holds have 64 KB in flight;
    at 4.3 TB/s and a microsecond of latency, 33 KB are needed. Short rows get fewer warps.
    """
    vector = 16 // dtype.itemsize
    covered = next_power_of_2(columns)
    warps = min(8, max(1, covered // (32 * vector)))
    lanes = 32 * vector * warps
    rounds = min(4, max(1, covered // lanes))
    return {"COLUMNS": columns, "LANES": lanes, "ROUNDS": rounds, "STAGES": 3, "num_warps": warps}


def tile_options(columns: int) -> dict[str, int]:
    """Block and warps for programs that each take one tile of a row: 32 columns a thread, all on their way at once."""
    block = min(8192, next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(1, block // 1024)}


def rows_side_by_side(x: Tensor) -> Tensor:
    """x, or a copy where the columns of [n, V] are not neighbours."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
