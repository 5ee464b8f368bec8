"""Log-probabilities, entropies and log-sum-exps of a language-model head, a token each, without keeping logits.

    x       = hidden weight^T / temperature                [T, V]
    lse     = log sum exp x,   p = exp(x - lse)
    logprob = x[target] - lse
    entropy = lse - sum_v p_v x_v

    dx = g_logprob (onehot(target) - p) + g_lse p - g_entropy p (x - lse + entropy)

The forward keeps [T] numbers only; the backward forms the logits again, at 8 T V d operations in all. It gets lse in
two parts, peak and log sum exp(x - peak): their sum has lost as many digits as stand before its point.

On a GPU the forward takes the logits of a chunk of tokens, fp32, and reads each row once. The backward takes the
vocabulary slice by slice: with lse known, a slice needs no other. dx of a slice and all tokens, rounded to the dtype
of the products, gathers from smaller chunks of logits, and then gives the slice of dweight in one product, without a
sum over chunks, and a term of dhidden, which is summed in fp32. Beside the results there are never more than the
workspace and, per number of hidden, a copy and 4 bytes. Of a frozen weight there is no dweight: the backward takes 4
T V d operations, a chunk of tokens at a time with its whole vocabulary, and no sum.

Traffic beside the products, b bytes a number: forward 4 T V, backward T V (4 + b) and 8 T d a slice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import accumulation_dtype, cdiv, launch, register_op, use_reference
from kernels.linear import multiply
from kernels.logits import gradient, row_options, row_statistics, target_logit, tile_options
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


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    wide = accumulation_dtype(hidden.dtype)
    scale = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    logits = hidden.to(wide) @ weight.to(wide).t() / scale
    counted = targets != IGNORE
    logprobs = logits.log_softmax(dim=-1)
    logprob = logprobs.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1) * counted
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1) * counted if with_entropy else None
    return logprob, entropy, logits.logsumexp(dim=-1) * counted


@triton.jit
def _linear_logprob_fwd_kernel(
    x_ptr,
    targets_ptr,
    temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    lse_ptr,
    peak_ptr,
    log_sum_ptr,
    x_stride,
    IGNORE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logprob, entropy, peak, log_sum = 0.0, 0.0, 0.0, 0.0
    if target != IGNORE:
        row_ptr = x_ptr + row * x_stride
        temperature = 1.0 if temperature_ptr is None else tl.load(temperature_ptr + row)
        inverse = 1.0 / temperature
        highest, log_sum, moment = row_statistics(row_ptr, inverse, COLUMNS, LANES, ROUNDS, STAGES, WITH_ENTROPY)
        peak = highest / temperature
        logprob = (target_logit(row_ptr, target, COLUMNS) - highest) / temperature - log_sum
        entropy = log_sum - moment * inverse if WITH_ENTROPY else 0.0
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, peak + log_sum)
    tl.store(peak_ptr + row, peak)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def _linear_logprob_bwd_kernel(
    x_ptr,
    dx_ptr,
    dlogprob_ptr,
    dentropy_ptr,
    dlse_ptr,
    targets_ptr,
    temperature_ptr,
    entropy_ptr,
    peak_ptr,
    log_sum_ptr,
    first,
    columns,
    x_stride,
    dx_stride,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of a tile, of logits that begin at column `first` of the vocabulary."""
    tiles = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0).to(tl.int64) // tiles
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    is_counted = target != IGNORE
    is_column = column < columns
    x = tl.load(x_ptr + row * x_stride + column, mask=is_column & is_counted, other=0.0)
    temperature = 1.0 if temperature_ptr is None else tl.load(temperature_ptr + row)
    z = x if temperature_ptr is None else x / temperature
    log_p = z - tl.load(peak_ptr + row) - tl.load(log_sum_ptr + row)
    slope, curve, at_target = 0.0, 0.0, 0.0
    if dlogprob_ptr is not None:
        at_target = tl.load(dlogprob_ptr + row)
        slope -= at_target
    if dlse_ptr is not None:
        slope += tl.load(dlse_ptr + row)
    if dentropy_ptr is not None:
        curve -= tl.load(dentropy_ptr + row)
        slope += curve * tl.load(entropy_ptr + row)
    dz = gradient(log_p, first + column == target, slope, curve, at_target, dentropy_ptr is not None)
    dx = tl.where(is_counted, dz * (1.0 / temperature), 0.0)
    tl.store(dx_ptr + row * dx_stride + column, dx, mask=is_column)


def _linear_logprob_fwd_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | None, with_entropy: bool
) -> tuple[Tensor, ...]:
    vocabulary, device = len(weight), hidden.device
    parts = runs(len(hidden), most(workspace(device), FP32 * padded(vocabulary)))
    logits = buffer(parts[0].stop, vocabulary, torch.float32, device)
    targets, temperature = targets.contiguous(), None if temperature is None else temperature.contiguous()
    results = tuple(torch.empty(len(hidden), dtype=torch.float32, device=device) for _ in range(5))
    options = row_options(vocabulary, torch.float32)
    for part in parts:
        x = logits[: part.stop - part.start]
        multiply(hidden[part], weight.t(), out=x)
        rows = (None if of_row is None else of_row[part] for of_row in (targets, temperature, *results))
        arguments = x, *rows, x.stride(0)
        launch(_linear_logprob_fwd_kernel, (len(x),), *arguments, IGNORE=IGNORE, WITH_ENTROPY=with_entropy, **options)
    return results


def vocabulary_slices(
    tokens: int, vocabulary: int, dtype: torch.dtype, budget: int, with_dweight: bool = True
) -> tuple[int, int]:
    """(columns of a slice, tokens whose logits exist at once): a third of the budget for logits, the rest for dx.
    Without dweight there is one slice, and dx exists for a chunk of tokens."""
    if not with_dweight:
        return vocabulary, most(budget, (FP32 + dtype.itemsize) * padded(vocabulary))
    columns = min(vocabulary, most(budget * 2 // 3, dtype.itemsize * max(1, tokens)))
    return columns, most(budget // 3, FP32 * padded(columns))


def _linear_logprob_bwd_triton(
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    entropy: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    with_dweight: bool,
) -> tuple[Tensor, Tensor]:
    (tokens, vocabulary), (dtype, device) = (len(hidden), len(weight)), (hidden.dtype, hidden.device)
    largest, chunk = vocabulary_slices(tokens, vocabulary, dtype, workspace(device), with_dweight)
    slices, parts = runs(vocabulary, largest), runs(tokens, chunk)
    of_rows = [
        None if of_row is None else of_row.contiguous()
        for of_row in (dlogprob, dentropy, dlse, targets, temperature, entropy, peak, log_sum)
    ]
    logits = buffer(parts[0].stop, slices[0].stop, torch.float32, device)
    dlogits = buffer(tokens if with_dweight else parts[0].stop, slices[0].stop, dtype, device)
    dhidden, dweight = _gradients(hidden, weight, with_dweight)
    total = dhidden if len(slices) == 1 else torch.empty(hidden.shape, dtype=torch.float32, device=device)
    if with_dweight:
        hidden = without_ignored(hidden, targets)

    for piece in slices:
        width = piece.stop - piece.start
        # Up to the padding, so that every load and store is of 16 bytes; what is written there is never read.
        columns = padded(width)
        options = tile_options(columns)
        for part in parts:
            x = logits[: part.stop - part.start, :width]
            dx = dlogits[part if with_dweight else slice(len(x)), :width]
            multiply(hidden[part], weight[piece].t(), out=x)
            rows = (None if of_row is None else of_row[part] for of_row in of_rows)
            arguments = x, dx, *rows, piece.start, columns, x.stride(0), dx.stride(0)
            grid = (len(x) * cdiv(columns, options["BLOCK"]),)
            launch(_linear_logprob_bwd_kernel, grid, *arguments, IGNORE=IGNORE, **options)
            if not with_dweight:
                multiply(dx, weight, out=dhidden[part])
        if with_dweight:
            dx = dlogits[:, :width]
            multiply(dx.t(), hidden, out=dweight[piece])
            multiply(dx, weight[piece], out=total, add=piece.start > 0)
    return dhidden if total is dhidden else dhidden.copy_(total), dweight


def _linear_logprob_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | None, with_entropy: bool
) -> tuple[Tensor, ...]:
    rows = counted_rows(targets)
    picked, labels, temperature = pick(rows, hidden, targets.clamp_min(0).unsqueeze(1), temperature)
    products = HeadProducts(weight)
    zeros = torch.zeros(len(picked), dtype=products.wide, device=hidden.device)
    logprob, entropy, peak, log_sum = (zeros.clone() for _ in range(4))
    for part in chunks(len(picked), len(weight), hidden.dtype, hidden.device):
        x = products.logits(picked[part])
        if temperature is not None:
            x.div_(temperature[part].unsqueeze(1))
        peak[part], log_sum[part] = log_softmax_(x)
        logprob[part] = x.gather(1, labels[part]).squeeze(1)
        if with_entropy:
            entropy[part] = -x.exp().mul_(x).sum(dim=-1)
    counted = targets != IGNORE
    results = logprob, entropy, peak + log_sum, peak, log_sum
    return tuple(put_back(rows, x, targets).where(counted, 0) for x in results)


def _linear_logprob_bwd(
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    entropy: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    with_dweight: bool,
) -> tuple[Tensor, Tensor]:
    rows = counted_rows(targets)
    counted = targets != IGNORE
    dlogprob, dlse = (0 * peak if x is None else x.where(counted, 0) for x in (dlogprob, dlse))
    dentropy = None if dentropy is None else dentropy.where(counted, 0)
    labels = targets.clamp_min(0).unsqueeze(1)
    picked, labels, temperature, entropy, peak, log_sum, dlogprob, dentropy, dlse = pick(
        rows, hidden, labels, temperature, entropy, peak, log_sum, dlogprob, dentropy, dlse
    )
    products = HeadProducts(weight)
    dpicked = torch.empty(picked.shape, dtype=products.wide, device=hidden.device)
    dweight = None
    for part in chunks(len(picked), len(weight), hidden.dtype, hidden.device):
        x = products.logits(picked[part])
        if temperature is not None:
            x.div_(temperature[part].unsqueeze(1))
        x.sub_(peak[part].unsqueeze(1)).sub_(log_sum[part].unsqueeze(1))  # log p
        slope = (dlse[part] - dlogprob[part]).unsqueeze(1)
        if dentropy is not None:
            slope = torch.mul(x, -dentropy[part].unsqueeze(1)).add_(
                slope - (dentropy[part] * entropy[part]).unsqueeze(1)
            )
        dx = x.exp_().mul_(slope)
        dx.scatter_add_(1, labels[part], dlogprob[part].unsqueeze(1))
        if temperature is not None:
            dx.div_(temperature[part].unsqueeze(1))
        dpicked[part] = products.dhidden(dx)
        if with_dweight:
            dweight = products.add_dweight(dweight, dx, picked[part])
    if dweight is None:
        dweight = weight.new_zeros(weight.shape if with_dweight else (0, 0))
    dweight = dweight.to(weight.dtype)
    return put_back(rows, dpicked.to(hidden.dtype), hidden), dweight


def _gradients(hidden: Tensor, weight: Tensor, with_dweight: bool) -> tuple[Tensor, Tensor]:
    """Room for dhidden and dweight; where that is not wanted, a tensor of nothing."""
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape if with_dweight else (0, 0))


def _fake_fwd(hidden, weight, targets, temperature, with_entropy):
    wide = accumulation_dtype(hidden.dtype)
    return tuple(hidden.new_empty(targets.shape, dtype=wide) for _ in range(5))


def _save(ctx, inputs, output) -> None:
    _, entropy, _, peak, log_sum = output
    ctx.with_entropy = inputs[4]
    ctx.mark_non_differentiable(peak, log_sum)
    ctx.save_for_backward(*inputs[:4], entropy, peak, log_sum)


def _autograd(ctx, dlogprob, dentropy, dlse, *_):
    dentropy = dentropy if ctx.with_entropy else None
    with_dweight = ctx.needs_input_grad[1]
    dhidden, dweight = _linear_logprob_bwd_op(dlogprob, dentropy, dlse, *ctx.saved_tensors, with_dweight)
    return dhidden, dweight if with_dweight else None, None, None, None


_linear_logprob_op = register_op(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor? temperature, bool with_entropy)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_logprob_fwd,
    _fake_fwd,
    triton=_linear_logprob_fwd_triton,
    setup_context=_save,
    backward=_autograd,
)
_linear_logprob_bwd_op = register_op(
    "linear_logprob_bwd(Tensor? dlogprob, Tensor? dentropy, Tensor? dlse, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor? temperature, Tensor entropy, Tensor peak, Tensor log_sum, bool with_dweight)"
    " -> (Tensor, Tensor)",
    _linear_logprob_bwd,
    lambda dlogprob, dentropy, dlse, hidden, weight, *rest: _gradients(hidden, weight, rest[-1]),
    triton=_linear_logprob_bwd_triton,
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the head says of each token's target: log-probability, entropy, log-sum-exp.

    Args:
        hidden: [T, d], any float dtype; logits in fp32 (fp64 for fp64).
        weight: [V, d], dtype of hidden. Its gradient is summed over tokens in fp32; frozen, it gets none.
        targets: int64 [T]. Where IGNORE (-100), all three results are 0 and have no gradient.
        temperature: divides the logits; a positive number or fp32 [T]. A constant: it gets no gradient.
        with_entropy: whether the entropy is wanted.
    Returns:
        (logprob [T], entropy [T] in nats or None, logsumexp [T]), fp32, each differentiable with any gradient
        per token. All three speak of the logits after division by the temperature.
    Raises:
        ValueError: shapes do not fit, or a temperature number that is not positive.
        RuntimeError: a target is outside the vocabulary. A GPU, where nobody waits to look, gives NaN.
    """
    check_head(hidden, weight, targets)
    if isinstance(temperature, Tensor):
        if temperature.shape != targets.shape:
            raise ValueError(f"temperature {tuple(temperature.shape)} for targets {tuple(targets.shape)}")
    elif temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if use_reference():
        return linear_logprob_reference(hidden, weight, targets, temperature, with_entropy)
    heat = temperature if isinstance(temperature, Tensor) else None
    if heat is None and temperature != 1:
        heat = torch.full(targets.shape, temperature, dtype=torch.float32, device=targets.device)
    logprob, entropy, lse, _, _ = _linear_logprob_op(hidden, weight, targets, heat, with_entropy)
    return logprob, entropy if with_entropy else None, lse
