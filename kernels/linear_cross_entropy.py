"""Cross-entropy of a language-model head, summed over tokens, without keeping logits.

    x   = hidden weight^T                                  logits, [T, V]
    lse = log sum exp x
    nll_sum = sum_t w_t (lse_t - x_t[target_t])            over targets that are not IGNORE
    z_sum   = z_loss * sum_t w_t lse_t^2                   (Chowdhery et al. 2022, PaLM, section 5)

    dx = w (1 + 2 z_loss lse) softmax(x) - w onehot(target)

The sums have one upstream gradient, a scalar, so the gradients of hidden and weight are formed in the forward
pass, while a chunk's logits are at hand, and the backward only scales them: 6 T V d operations, where forming
the logits again would take 8.

On a GPU tokens are taken at two levels. Logits, fp32, exist for a chunk of tokens; one kernel reads each row twice,
for its sum and for dx. dx, rounded to the dtype of the products, gathers in a buffer until a group of chunks is
there, and only then is multiplied, dhidden = dx weight and dweight += dx^T hidden, because adding to dweight, in fp32,
moves 8 V d bytes a group. All tokens are one group wherever its dx takes no more room than such a sum would (in bf16,
up to 2 d tokens): then no sum is needed, and one product writes dweight. Beside the results there are never more than
4 V d bytes, the workspace, and a copy of hidden. Of a frozen weight there is no dweight: 4 T V d operations, each
chunk's dx is multiplied at once, and the workspace is all there is.

Traffic beside the products, b bytes a number: T V (8 + b) for dx, and 10 V d for dweight where there are groups,
8 V d more for each beyond the first; the backward 2 (T + V) d b.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import accumulation_dtype, cdiv, launch, register_op, use_reference
from kernels.linear import multiply
from kernels.logits import gradient, row_options, row_statistics, target_logit
from kernels.vocabulary import (
    IGNORE,
    HeadProducts,
    buffer,
    check_head,
    chunks,
    counted_rows,
    log_softmax_,
    most,
    padded,
    pick,
    put_back,
    runs,
    without_ignored,
    workspace,
)

FP32 = 4


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(hidden.dtype)
    logits = hidden.to(wide) @ weight.to(wide).t()
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    scale = (targets != IGNORE).to(wide)
    scale = scale if weights is None else scale * weights
    return (scale * nll).sum(), z_loss * (scale * logits.logsumexp(dim=-1).square()).sum()


@triton.jit
def _linear_cross_entropy_kernel(
    x_ptr,
    targets_ptr,
    weights_ptr,
    nll_ptr,
    z_ptr,
    dx_ptr,
    x_stride,
    dx_stride,
    z_loss,
    IGNORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row: its terms of the sums, and its dx where that is wanted."""
    TILE: tl.constexpr = LANES * ROUNDS
    # dx is written up to the padding, so that every load and store is of 16 bytes; nobody reads it there.
    PADDED: tl.constexpr = (COLUMNS + 63) // 64 * 64
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    x_ptr += row * x_stride
    place = tl.arange(0, TILE)
    if target == IGNORE:
        tl.store(nll_ptr + row, 0.0)
        tl.store(z_ptr + row, 0.0)
        if dx_ptr is not None:
            for start in range(0, PADDED, TILE):
                zero = tl.zeros((TILE,), tl.float32)
                tl.store(dx_ptr + row * dx_stride + start + place, zero, mask=start + place < PADDED)
    else:
        peak, log_sum, _ = row_statistics(x_ptr, 1.0, COLUMNS, LANES, ROUNDS, STAGES, False)
        lse = peak + log_sum
        scale = 1.0 if weights_ptr is None else tl.load(weights_ptr + row)
        tl.store(nll_ptr + row, scale * (peak - target_logit(x_ptr, target, COLUMNS) + log_sum))
        tl.store(z_ptr + row, scale * z_loss * lse * lse)
        if dx_ptr is not None:
            slope = scale * (1 + 2 * z_loss * lse)
            for start in tl.range(0, PADDED, TILE, num_stages=STAGES):
                column = start + place
                is_column = column < PADDED
                x = tl.load(x_ptr + column, mask=is_column, other=0.0)
                dx = gradient(x - peak - log_sum, column == target, slope, 0.0, -scale, False)
                tl.store(dx_ptr + row * dx_stride + column, dx, mask=is_column)


@triton.jit
def _scaled_kernel(x_ptr, factor_ptr, y_ptr, numbers, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < numbers, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, x * tl.load(factor_ptr), mask=place < numbers)


def token_groups(
    tokens: int, vocabulary: int, width: int, dtype: torch.dtype, budget: int, with_dweight: bool = True
) -> tuple[int, int]:
    """(tokens whose dx is gathered before it is multiplied, tokens whose logits exist at once).

    In one group, the buffers take at most 4 V d bytes and the budget; in several, beside a sum of that size, the
    budget alone: a third of it for logits, the rest for dx. Without dweight a group is a chunk.
    """
    row = padded(vocabulary)
    if not with_dweight:
        return (most(budget, (FP32 + dtype.itemsize) * row),) * 2
    spare = FP32 * vocabulary * width + budget - dtype.itemsize * tokens * row
    if spare >= budget // 3:
        return tokens, most(min(spare, budget), FP32 * row)
    chunk = most(budget // 3, FP32 * row)
    return most(budget - FP32 * chunk * row, dtype.itemsize * row), chunk


def _linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    z_loss: float,
    with_grad: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (tokens, width), vocabulary = hidden.shape, len(weight)
    dtype, device = hidden.dtype, hidden.device
    group, chunk = tokens, most(workspace(device), FP32 * padded(vocabulary))
    if with_grad:
        group, chunk = token_groups(tokens, vocabulary, width, dtype, workspace(device), with_dweight)
    if with_dweight:
        hidden = without_ignored(hidden, targets)
    groups = runs(tokens, group)
    group = groups[0].stop
    logits = buffer(runs(group, chunk)[0].stop, vocabulary, torch.float32, device)
    dlogits = buffer(group, vocabulary, dtype, device) if with_grad else None
    is_sum = with_dweight and len(groups) > 1
    total = torch.empty(weight.shape, dtype=torch.float32, device=device) if is_sum else None
    nll, z = (torch.empty(tokens, dtype=torch.float32, device=device) for _ in range(2))
    dhidden, dweight = _results(hidden, weight, with_grad, with_dweight)
    of_rows = targets.contiguous(), None if weights is None else weights.contiguous(), nll, z
    options = row_options(vocabulary, torch.float32) | {"IGNORE": IGNORE}

    for rows in groups:
        dx = None if dlogits is None else dlogits[: rows.stop - rows.start]
        for part in runs(rows.stop - rows.start, chunk):
            at = slice(rows.start + part.start, rows.start + part.stop)
            x = logits[: part.stop - part.start]
            multiply(hidden[at], weight.t(), out=x)
            arguments = x, *(of_row if of_row is None else of_row[at] for of_row in of_rows)
            arguments = *arguments, dx if dx is None else dx[part]
            strides = x.stride(0), 0 if dx is None else dx.stride(0)
            launch(_linear_cross_entropy_kernel, (len(x),), *arguments, *strides, z_loss, **options)
        if dx is not None:
            multiply(dx, weight, out=dhidden[rows])
        if dx is not None and with_dweight:
            multiply(dx.t(), hidden[rows], out=dweight if total is None else total, add=rows.start > 0)
    if total is not None:
        dweight.copy_(total)
    return nll.sum(), z.sum(), dhidden, dweight


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    z_loss: float,
    with_grad: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = counted_rows(targets)
    picked, targets, weights = pick(rows, hidden, targets, weights)
    products = HeadProducts(weight)
    scale = (targets != IGNORE).to(products.wide)
    scale = scale if weights is None else scale * weights
    labels = targets.clamp_min(0).unsqueeze(1)

    nll = torch.zeros(len(picked), dtype=products.wide, device=hidden.device)
    lse = torch.zeros_like(nll)
    dpicked = torch.empty(picked.shape if with_grad else (0, 0), dtype=products.wide, device=hidden.device)
    dweight = None
    for part in chunks(len(picked), len(weight), hidden.dtype, hidden.device):
        x = products.logits(picked[part])
        peak, log_sum = log_softmax_(x)
        lse[part] = peak + log_sum
        nll[part] = -x.gather(1, labels[part]).squeeze(1)
        if with_grad:
            row_scale = scale[part] * (1 + 2 * z_loss * lse[part])
            dx = x.exp_().mul_(row_scale.unsqueeze(1))
            dx.scatter_add_(1, labels[part], -scale[part].unsqueeze(1))
            dpicked[part] = products.dhidden(dx)
        if with_dweight:
            dweight = products.add_dweight(dweight, dx, picked[part])

    if dweight is None:
        dweight = weight.new_zeros(weight.shape if with_dweight else (0, 0))
    dhidden = put_back(rows, dpicked.to(hidden.dtype), hidden) if with_grad else dpicked.to(hidden.dtype)
    return (scale * nll).sum(), z_loss * (scale * lse.square()).sum(), dhidden, dweight.to(weight.dtype)


def _results(hidden: Tensor, weight: Tensor, with_grad: bool, with_dweight: bool) -> tuple[Tensor, Tensor]:
    """Room for dhidden and dweight; of one that is not wanted, a tensor of nothing."""
    wanted = (hidden, with_grad), (weight, with_dweight)
    dhidden, dweight = (x.new_empty(x.shape if is_wanted else (0, 0)) for x, is_wanted in wanted)
    return dhidden, dweight


def _fake(hidden, weight, targets, weights, z_loss, with_grad, with_dweight):
    wide = accumulation_dtype(hidden.dtype)
    sums = hidden.new_empty((), dtype=wide), hidden.new_empty((), dtype=wide)
    return *sums, *_results(hidden, weight, with_grad, with_dweight)


def _save(ctx, inputs, output) -> None:
    _, _, dhidden, dweight = output
    ctx.has_z_loss = inputs[4] != 0
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.save_for_backward(dhidden, dweight)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).to(x.dtype)


def _scaled_triton(x: Tensor, factor: Tensor) -> Tensor:
    """torch would round a factor on a GPU to the dtype of x: in bf16, all gradients would be off by up to 0.2%."""
    x, y = x.contiguous(), x.new_empty(x.shape)
    block = 8192  # 32 numbers a thread, for four loads of 16 bytes
    launch(_scaled_kernel, (cdiv(x.numel(), block),), x, factor, y, x.numel(), BLOCK=block, num_warps=8)
    return y


def _autograd(ctx, dnll, dz, *_):
    dhidden, dweight = ctx.saved_tensors
    if ctx.has_z_loss:
        zero = dhidden.new_zeros((), dtype=accumulation_dtype(dhidden.dtype))
        dnll, dz = (zero if grad is None else grad for grad in (dnll, dz))
        is_one = (dnll == dz) | dnll.isnan()  # NaN is for the guard to see, not an error
        torch._assert_async(is_one, "nll_sum and z_sum need one upstream gradient: call backward on their sum")
    if dnll is None:
        return (None,) * 7
    needed = zip((dhidden, dweight), ctx.needs_input_grad[:2], strict=True)
    scaled = (_scaled_op(x, dnll) if is_needed else None for x, is_needed in needed)
    return *scaled, None, None, None, None, None


_scaled_op = register_op(
    "scaled(Tensor x, Tensor factor) -> Tensor",
    _scaled,
    lambda x, factor: torch.empty_like(x),
    triton=_scaled_triton,
)
_linear_cross_entropy_op = register_op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? weights, float z_loss,"
    " bool with_grad, bool with_dweight) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
    _fake,
    triton=_linear_cross_entropy_triton,
    setup_context=_save,
    backward=_autograd,
)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weighted sums of the negative log-likelihood and of the z-loss over all targets.

    Args:
        hidden: [T, d], any float dtype; logits and sums in fp32 (fp64 for fp64).
        weight: [V, d], dtype of hidden. Its gradient is summed over tokens in fp32; frozen, it gets none.
        targets: int64 [T], or IGNORE (-100), which adds nothing and has no gradient.
        weights: fp32 [T], a constant factor for each token, or None for 1.
        z_loss: coefficient of the squared log-sum-exp.
    Returns:
        (nll_sum, z_sum), fp32 scalars. Differentiate their sum, scaled as you like: with a z-loss the two
        must receive the same upstream gradient, or the backward raises.
    Raises:
        ValueError: shapes do not fit.
        RuntimeError: a target is outside the vocabulary. A GPU, where nobody waits to look, gives NaN.
    """
    check_head(hidden, weight, targets)
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"weights {tuple(weights.shape)} for targets {tuple(targets.shape)}")
    if use_reference():
        return linear_cross_entropy_reference(hidden, weight, targets, weights, z_loss)
    with_dweight = torch.is_grad_enabled() and weight.requires_grad
    with_grad = with_dweight or (torch.is_grad_enabled() and hidden.requires_grad)
    return _linear_cross_entropy_op(hidden, weight, targets, weights, z_loss, with_grad, with_dweight)[:2]
