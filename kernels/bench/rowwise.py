"""Workloads of the ops that stream rows: norms, SwiGLU, cross-entropy from logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench import peers, targets, work
from kernels.bench.workload import OURS, Contender, Inputs, Outcome, Workload
from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.swiglu import swiglu, swiglu_reference

EPS = 1e-5
# Rows of the reference at a time, when a result is checked: in fp32, with autograd, it needs several times the memory.
CHECKED_ROWS = 1024


class Random:
    """Numbers for inputs, the same for the same seed."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device, self._dtype = device, dtype

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, has_grad: bool = True) -> Tensor:
        x = torch.empty(shape, dtype=self._dtype, device=self._device).normal_(shift, scale, generator=self._generator)
        return x.requires_grad_(has_grad)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self._device, generator=self._generator)


def row_check(
    reference: Callable[..., Any], row_inputs: tuple[int, ...], is_sum: bool = False
) -> Callable[[Inputs, list[Tensor], Outcome], Iterator[tuple[str, Tensor, Tensor]]]:
    """Against the reference in fp32, some rows at a time.

    Args:
        row_inputs: positions of the inputs that have a row for every row of the results; others are shared.
        is_sum: the result is a sum over rows, with an upstream gradient of one.
    """

    def check(inputs: Inputs, upstream: list[Tensor], outcome: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
        outputs, gradients = outcome
        shared = {i: _wide(x) for i, x in enumerate(inputs) if i not in row_inputs}
        totals: list[list[Tensor]] = [[] for _ in outputs]
        row_gradients: dict[int, list[Tensor]] = {}
        rows = len(inputs[row_inputs[0]])
        for start in range(0, rows, CHECKED_ROWS):
            part = slice(start, start + CHECKED_ROWS)
            args = [_wide(x[part]) if i in row_inputs else shared[i] for i, x in enumerate(inputs)]
            results = reference(*args)
            results = (results,) if isinstance(results, Tensor) else [x for x in results if x is not None]
            for total, result in zip(totals, results, strict=True):
                total.append(result.detach())
            if gradients:
                if is_sum:
                    torch.autograd.backward(results)
                else:
                    torch.autograd.backward(
                        results, [x[part].to(y.dtype) for x, y in zip(upstream, results, strict=True)]
                    )
                for i in row_inputs:
                    if isinstance(args[i], Tensor) and args[i].requires_grad:
                        row_gradients.setdefault(i, []).append(args[i].grad)
        for index, (output, total) in enumerate(zip(outputs, totals, strict=True)):
            yield f"result {index}", output, torch.stack(total).sum() if is_sum else torch.cat(total)
        if not gradients:
            return
        leaves = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
        for i, found in zip(leaves, gradients, strict=True):
            expected = torch.cat(row_gradients.pop(i)) if i in row_inputs else shared[i].grad
            yield f"gradient of input {i}", found, expected

    return check


def _wide(x: Any) -> Any:
    """A leaf of its own, in fp32."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().float().requires_grad_(x.requires_grad)


def norm_workload(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_residual: bool,
    compiled: bool = False,
    heads: int = 1,
) -> Workload:
    """heads: rows are heads of a [rows / heads, heads, columns] tensor, as in norms of queries and keys."""
    op: Callable[..., Any] = add_rms_norm if with_residual else rms_norm
    reference: Callable[..., Any] = add_rms_norm_reference if with_residual else rms_norm_reference
    shape = (rows, columns) if heads == 1 else (rows // heads, heads, columns)
    arrays = 2 if with_residual else 1

    def make(seed: int) -> Inputs:
        random = Random(seed, device, dtype)
        weight = random.normal(columns, scale=0.1, shift=1.0)
        return *(random.normal(*shape) for _ in range(arrays)), weight

    def eager(*inputs: Tensor) -> Any:
        *added, weight = inputs
        total = sum(added)
        normed = F.rms_norm(total, (columns,), weight, EPS)
        return (normed, total) if with_residual else normed

    def specified(*inputs: Tensor) -> Any:
        return reference(*inputs, EPS)

    contenders = [Contender(OURS, lambda *inputs: op(*inputs, EPS), "ours"), Contender("eager", eager)]
    if compiled:
        contenders.append(Contender("compile", peers.compiled(specified)))
    module, function = (
        ("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
        if with_residual
        else (
            "rms_norm",
            "LigerRMSNormFunction",
        )
    )
    liger = peers.liger(module, function)
    if liger is not None:
        contenders.append(Contender("liger", lambda *inputs: liger.apply(*inputs, EPS, 0.0, "llama", True)))
    return Workload(
        op.__name__,
        "x".join(map(str, shape)),
        dtype,
        work.norm_work(rows, columns, dtype.itemsize, with_residual),
        make,
        contenders,
        row_check(specified, tuple(range(arrays))),
        targets=[targets.percent("forward", 90), targets.percent("backward", 80)] if heads == 1 else [],
    )


def swiglu_workload(
    tokens: int, columns: int, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Workload:
    """columns: of one half, the feed-forward width."""

    def make(seed: int) -> Inputs:
        return (Random(seed, device, dtype).normal(tokens, 2 * columns),)

    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    contenders = [Contender(OURS, swiglu, "ours"), Contender("eager", eager)]
    if compiled:
        contenders.append(Contender("compile", peers.compiled(swiglu_reference)))
    liger = peers.liger("swiglu", "LigerSiLUMulFunction")
    if liger is not None:
        # Its models have two projections, so gate and up lie apart. Its backward writes over both.
        contenders.append(
            Contender(
                "liger",
                liger.apply,
                adapt=lambda inputs: tuple(
                    x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
                    for x in inputs[0].chunk(2, dim=-1)
                ),
                canonical=lambda outcome: (outcome[0], [torch.cat(outcome[1], dim=-1)]),
                spoils=True,
            )
        )
    packed = peers.liger("swiglu", "LigerFusedGateUpSiLUMulFunction")
    if packed is not None:
        contenders.append(Contender("liger packed", packed.apply))
    return Workload(
        "swiglu",
        f"{tokens}x2x{columns}",
        dtype,
        work.swiglu_work(tokens, columns, dtype.itemsize),
        make,
        contenders,
        row_check(swiglu_reference, (0,)),
        targets=[targets.percent("forward", 85), targets.percent("backward", 85)],
    )


def cross_entropy_workload(
    tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Workload:
    """Upstream gradients are ones: Liger's returns the sum, and its gradient is made in its forward pass."""

    def make(seed: int) -> Inputs:
        random = Random(seed, device, dtype)
        return random.normal(tokens, vocabulary), random.integers(vocabulary, tokens)

    def eager(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")

    def summed(outcome: Outcome) -> Outcome:
        return [x.float().sum() for x in outcome[0]], outcome[1]

    contenders = [
        Contender(OURS, cross_entropy, "ours", canonical=summed),
        Contender("eager", eager, canonical=summed),
    ]
    if compiled:
        contenders.append(Contender("compile", peers.compiled(cross_entropy_reference), canonical=summed))
    liger = peers.liger("cross_entropy", "LigerCrossEntropyFunction")
    if liger is not None:

        def call(logits: Tensor, target: Tensor) -> Tensor:
            return liger.apply(logits, target, None, -100, 0.0, 0.0, "sum")[0]

        contenders.append(Contender("liger", call, spoils=True))
    return Workload(
        "cross_entropy",
        f"{tokens}x{vocabulary}",
        dtype,
        work.cross_entropy_work(tokens, vocabulary, dtype.itemsize),
        make,
        contenders,
        row_check(lambda *inputs: cross_entropy_reference(*inputs).sum(), (0, 1), is_sum=True),
        upstream="ones",
        targets=[targets.percent("forward", 85), targets.percent("backward", 85)],
    )
