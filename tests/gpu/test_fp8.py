"""Products of 8-bit numbers by the vendor's library, at the sizes of models: right, and the same each time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.fp8_linear import fp8_linear, fp8_linear_reference, has_fp8
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_fp8(torch.device(DEVICE)), reason="needs a GPU with 8-bit products"),
]
BF16 = torch.bfloat16
# Gates and ups of `7b`, and back; tokens that are no multiple of 16.
SHAPES = [(8192, 4096, 22016), (8192, 11008, 4096), (8191, 4096, 12288), (1, 4096, 12288)]


def run(op, *arguments: Tensor | None, dy: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [x.detach().requires_grad_() for x in arguments if x is not None]
    y = op(*leaves, *[None] * (3 - len(leaves)))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_those_of_the_reference_in_fp32_and_repeat_bitwise(shape: tuple[int, int, int]) -> None:
    tokens, width, out = shape
    x, weight = random(tokens, width, dtype=BF16), random(out, width, seed=1, dtype=BF16) * width**-0.5
    dy = random(tokens, out, seed=2, dtype=BF16) * 1e-6
    ours = run(fp8_linear, x, weight, dy=dy)
    again = run(fp8_linear, x, weight, dy=dy)
    truth = run(fp8_linear_reference, x.float(), weight.float(), dy=dy.float())
    # Whole sums in the tensor core are off by up to 2% at 4096 terms (DeepSeek-AI 2024, section 3.3.2), and by more at
    # more; parts of them, added in fp32, by the last place of bf16 and little more.
    allowed = 0.02 * max(1, width / 4096), 2**-8 + 2**-10, 2**-8 + 2**-10
    for found, repeated, true, share in zip(ours, again, truth, allowed, strict=True):
        assert torch.equal(found, repeated)
        assert (found.float() - true).norm() <= share * true.norm()


def test_a_bias_is_added() -> None:
    x, weight, bias = random(64, 256, dtype=BF16), random(512, 256, seed=1, dtype=BF16), random(512, seed=2, dtype=BF16)
    dy = random(64, 512, seed=3, dtype=BF16)
    y, _, _, dbias = run(fp8_linear, x, weight, bias, dy=dy)
    assert torch.equal(y, fp8_linear(x, weight) + bias) and torch.equal(dbias, dy.sum(0))
