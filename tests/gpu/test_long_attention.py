"""Attention over many waves of programs, again and again: what a race or a missing fence would change now and then."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_long_documents_repeat_bitwise(width: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(16384, heads, width, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (32, 8, 8, 32)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bounds = torch.tensor([0, 10000, 10003, 16384], dtype=torch.int32, device="cuda")

    def run() -> list[torch.Tensor]:
        out = attention(*leaves, bounds, bounds, 10000, 10000, provider="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    first = run()
    assert all(x.isfinite().all() for x in first)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
