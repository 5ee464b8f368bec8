"""How a face of an op is held to its reference.

The reference is run twice: in float64, which is the truth, and in the dtype under test, which says how much
rounding the computation costs anyway. A face may err at most twice as much as the latter in the Euclidean norm,
plus a few last places at the size of the result, or of the largest result where results are differences of larger
numbers. No tolerance is chosen by hand.

The norm is taken because the largest error of a few numbers is a matter of luck; a single wrong entry is far above
the allowance in either measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tests.kernels.faces import DEVICE

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_faithful(
    face: Op,
    reference: Op,
    inputs: Sequence[Tensor],
    *,
    cancels: bool = False,
    grad_seed: int = 1,
    has_gradients: bool = True,
) -> None:
    """Results and the gradients of all inputs of `face` are as good as the reference's in the same dtype.

    Args:
        face, reference: functions of `inputs` that return one tensor or several.
        inputs: float tensors of the dtype under test, each of which gets a gradient.
        cancels: some results are differences of numbers as large as the largest of them.
        has_gradients: False for ops without; then results alone are compared.
    """
    run = partial(_run, grad_seed=grad_seed) if has_gradients else _run_forward
    truth = run(reference, [x.double() for x in inputs])
    plain = run(reference, inputs)
    tested = run(face, inputs)
    assert len(truth) == len(tested)
    largest = max(x.norm() for x in truth)
    for index, (true, rounded, ours) in enumerate(zip(truth, plain, tested, strict=True)):
        assert ours.shape == rounded.shape and ours.dtype == rounded.dtype, f"result {index}: {ours.shape} {ours.dtype}"
        size = largest if cancels else true.norm()
        last_places = 4 * torch.finfo(ours.dtype).eps * size
        allowed = 2 * (rounded.double() - true).norm() + last_places
        error = (ours.double() - true).norm()
        print(f"result {index}: relative error {error / true.norm():.2e} {ours.dtype}")  # shown by pytest -rP
        assert error <= allowed, f"result {index}: error {error:.3g}, allowed {allowed:.3g}"


def _run_forward(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    results = op(*inputs)
    return [results] if isinstance(results, Tensor) else list(results)


def _run(op: Op, inputs: Sequence[Tensor], grad_seed: int) -> list[Tensor]:
    """Results, then gradients of all inputs under random upstream gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = op(*leaves)
    results = (results,) if isinstance(results, Tensor) else results
    upstream = [random(*y.shape, seed=grad_seed + i, dtype=y.dtype) for i, y in enumerate(results)]
    torch.autograd.backward(results, upstream)
    for leaf in leaves:
        assert leaf.grad is not None
    return [y.detach() for y in results] + [leaf.grad for leaf in leaves if leaf.grad is not None]
