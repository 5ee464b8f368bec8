"""What each op must move and compute at the least: every input read once, every result written once.

`b` is the size of a number in bytes. Statistics of a row (a few bytes) are counted where they are part of the
results; what an implementation keeps for its backward is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.bench.workload import Pass, Work

Works = dict[Pass, Work]


def norm_work(rows: int, columns: int, b: int, with_residual: bool) -> Works:
    """Forward: x (and the residual) in, y (and the sum) out. Backward: dy, x (and the sum's gradient) in, dx out."""
    array = rows * columns * b
    return {
        "forward": Work((4 if with_residual else 2) * array + columns * b),
        "backward": Work((4 if with_residual else 3) * array + 2 * columns * b),
    }


def rotary_work(tokens: int, heads: int, width: int, positions: int, b: int) -> Works:
    """Each head in and out; fp32 tables and int64 positions in. `heads` counts all that are read."""
    one = Work(2 * tokens * heads * width * b + 8 * tokens + 4 * positions * width)
    return {"forward": one, "backward": one}


def swiglu_work(tokens: int, columns: int, b: int) -> Works:
    """Gate and up in, y out; then dy, gate and up in, both gradients out."""
    array = tokens * columns * b
    return {"forward": Work(3 * array), "backward": Work(5 * array)}


def cross_entropy_work(tokens: int, vocabulary: int, b: int) -> Works:
    """Logits in; then logits in, their gradient out. int64 targets, fp32 losses."""
    array = tokens * vocabulary * b
    return {"forward": Work(array + 12 * tokens), "backward": Work(2 * array + 12 * tokens)}


def head_work(tokens: int, width: int, vocabulary: int, b: int) -> Works:
    """One product of 2 T d V operations forward, two backward; logits made anew in the backward are not counted."""
    product, arrays = 2 * tokens * width * vocabulary, (tokens + vocabulary) * width * b
    return {
        "forward": Work(arrays + 12 * tokens, product),
        "backward": Work(2 * arrays + 12 * tokens, 2 * product),
    }


def low_rank_work(tokens: int, width: int, out: int, adapted: Sequence[int], rank: int, b: int) -> Works:
    """The frozen product each way, and two thin products of each adapter forward, four backward.

    Args:
        adapted: outputs of each part that has an adapter.
    """
    product, ranks = 2 * tokens * width * out, len(adapted) * rank
    thin = 2 * tokens * (width * ranks + sum(adapted) * rank)
    arrays, adapters = (tokens * (width + out) + width * out) * b, (width * ranks + sum(adapted) * rank) * b
    return {
        "forward": Work(arrays + adapters, product + thin),
        # dy, x and the weights in, dx and the adapters' gradients out
        "backward": Work(arrays + tokens * width * b + 2 * adapters, product + 2 * thin),
    }


def fp8_linear_work(tokens: int, width: int, out: int, b: int) -> Works:
    """One product forward, two backward. An 8-bit operation takes half the time of a 16-bit one, and counts as half."""
    product = tokens * width * out
    arrays = tokens * (width + out) + width * out
    return {
        "forward": Work(arrays * b, product),
        # dy, x and the weight in, two gradients out
        "backward": Work((arrays + tokens * width + width * out) * b, 2 * product),
    }


def attention_work(lengths: Sequence[int], heads: int, kv_heads: int, width: int, b: int) -> Works:
    """Two products over the visible pairs forward, five backward: 4 and 10 operations a pair and entry of a head."""
    tokens = sum(lengths)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    queries, keys = tokens * heads * width * b, tokens * kv_heads * width * b
    return {
        "forward": Work(2 * queries + 2 * keys, 4 * pairs * heads * width),
        # q, k, v, out and its gradient in, three gradients out
        "backward": Work(4 * queries + 4 * keys, 10 * pairs * heads * width),
    }


def decode_work(lengths: Sequence[int], heads: int, kv_heads: int, width: int, b: int) -> Works:
    """One query a row against its cache: keys and values in, once."""
    rows, context = len(lengths), sum(lengths)
    moved = 2 * context * kv_heads * width * b + 2 * rows * heads * width * b
    return {"forward": Work(moved, 4 * context * heads * width)}


def adamw_work(parameters: int, has_shadow: bool = False) -> Works:
    """fp32 parameter (whole or in halves) and two moments in and out, fp32 gradient in; a bf16 shadow out."""
    return {"forward": Work((30 if has_shadow else 28) * parameters)}


def grad_norm_work(parameters: int) -> Works:
    return {"forward": Work(4 * parameters)}


def sample_work(rows: int, vocabulary: int, b: int) -> Works:
    """Logits in; int64 seed in, int64 token and fp32 log-probability out."""
    return {"forward": Work(rows * vocabulary * b + 20 * rows)}


def gae_work(tokens: int) -> Works:
    """fp32 rewards and values and a byte of mask in, fp32 advantages and returns out."""
    return {"forward": Work(17 * tokens)}
