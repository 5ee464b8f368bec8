"""Products that add themselves to fp32 gradients, by the vendor's library: right, and with nothing beside the sum."""

from __future__ import annotations

import pytest
import torch

from kernels.linear import linear
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's products"),
]
T, IN, OUT = 64, 4096, 12288


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_passes_are_those_of_fp32_and_take_no_memory_beside(dtype: torch.dtype) -> None:
    weight = random(OUT, IN, dtype=dtype).requires_grad_()
    weight.grad_dtype = torch.float32
    truth = torch.zeros(OUT, IN, dtype=torch.float64, device=DEVICE)
    size = torch.zeros_like(truth)
    addresses = set()
    for i in (1, 2, 3):
        x, dy = random(T, IN, seed=2 * i, dtype=dtype), random(T, OUT, seed=2 * i + 1, dtype=dtype)
        truth.addmm_(dy.double().t(), x.double())
        size.addmm_(dy.double().t().abs(), x.double().abs())
        y = linear(x.requires_grad_(), weight)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y.backward(dy)
        # The first pass makes the sum, and the library its workspace.
        assert i == 1 or torch.cuda.max_memory_allocated() - before < weight.nbytes // 2
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        addresses.add(weight.grad.data_ptr())
    assert len(addresses) == 1
    # The matrix unit may drop what lies beyond the last place, of a term and of the sum: 2^-23 of the size, each.
    assert ((weight.grad - truth).abs() <= 2 * 3 * T * 2**-23 * size).all()
    # Rounded to `dtype` on the way, the gradient would not be there.
    rounded = truth.to(dtype).double()
    assert not ((rounded - truth).abs() <= 2 * 3 * T * 2**-23 * size).all()
