"""Ops as PyTorch sees them: schemas, fake tensors, autograd rules, recomputation, and the choice of a face."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from kernels import backend
from kernels.attention import attention
from kernels.fp8_linear import fp8_linear, has_fp8
from kernels.linear import linear
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_logprob import linear_logprob
from kernels.low_rank import low_rank_linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import rotary
from kernels.swiglu import swiglu
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

CU = torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=DEVICE)
TARGETS = torch.tensor([0, 4, -100, 2, 1, -100, 6, 3], device=DEVICE)
POSITIONS = torch.arange(8, device=DEVICE)
TABLE = random(8, 8, seed=9)
ONE = torch.ones((), device=DEVICE)
HAS_FP8 = has_fp8(torch.device(DEVICE))
in_8_bits = pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with 8-bit products")


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).requires_grad_()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rms_norm", lambda: (leaf(8, 16), leaf(16, seed=1), 1e-6)),
        ("add_rms_norm", lambda: (leaf(8, 16), leaf(8, 16, seed=2), leaf(16, seed=1), 1e-6)),
        ("swiglu", lambda: (leaf(8, 16),)),
        pytest.param("fp8_linear", lambda: (leaf(8, 16), leaf(32, 16, seed=1), leaf(32, seed=2)), marks=in_8_bits),
        pytest.param("fp8_linear_bwd", lambda: (random(8, 32), random(8, 16), None, ONE, ONE), marks=in_8_bits),
        ("matmul_nt", lambda: (leaf(8, 16), leaf(5, 16, seed=1))),
        (
            "low_rank_linear",
            lambda: (
                *(leaf(8, 16), random(7, 16, seed=1), random(7, seed=2), leaf(4, 16, seed=3), leaf(5, 2, seed=4)),
                *(0.5, [3, 2, 2], [True, False, True], leaf(8, 16, seed=5)),
            ),
        ),
        ("rotary", lambda: (leaf(8, 4, 16), leaf(8, 2, 16, seed=1), POSITIONS, TABLE, TABLE, False)),
        ("split_rotary", lambda: (leaf(8, 8, 16), 4, 2, POSITIONS, TABLE, TABLE)),
        (
            "attention",
            lambda: (leaf(8, 4, 16), leaf(8, 2, 16, seed=1), leaf(8, 2, 16, seed=2), CU, CU, 8, 8, 0.25, None, None),
        ),
        ("linear_logprob", lambda: (leaf(8, 16), leaf(7, 16, seed=1), TARGETS, None, True)),
        ("linear_cross_entropy", lambda: (leaf(8, 16), leaf(7, 16, seed=1), TARGETS, None, 0.0, True, True)),
    ],
)
def test_an_op_keeps_its_word_to_the_dispatcher(name: str, arguments) -> None:
    opcheck(
        getattr(torch.ops.chimed, name).default,
        arguments(),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def block(x: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
    """Every op of a layer, and both ops of the head."""
    y, x = add_rms_norm(rms_norm(x, norm, 1e-6), x, norm, 1e-6)
    heads = linear(y, weight).unflatten(1, (4, 16))
    q, k = rotary(heads, heads, POSITIONS, TABLE, TABLE)
    y = x + attention(q, k, heads, CU, CU, 8, 8).flatten(1)
    if HAS_FP8:
        y = y + fp8_linear(y, weight)
    y = low_rank_linear(y, weight.detach(), None, weight[:4], weight[:, :2], 0.5, (40, 24))
    y = torch.cat((swiglu(y), x[:, :32]), dim=1)
    nll, z = linear_cross_entropy(y, weight, TARGETS, z_loss=0.1)
    return nll + z + linear_logprob(y, weight, TARGETS, with_entropy=True)[0].sum()


def block_inputs() -> list[Tensor]:
    return [leaf(8, 64), (leaf(64, 64, seed=1) * 0.1).detach().requires_grad_(), leaf(64, seed=2)]


def gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def test_fake_tensors_run_forward_and_backward_without_data() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = (8, 64), (64, 64), (64,)
        inputs = [torch.empty(shape, device=DEVICE, requires_grad=True) for shape in shapes]
        grads = gradients(block(*inputs), inputs[:2])
    assert [grad.shape for grad in grads] == [(8, 64), (64, 64)]


def test_recomputed_layers_have_the_same_gradients_bitwise() -> None:
    inputs = block_inputs()
    kept = gradients(block(*inputs), inputs)
    recomputed = gradients(checkpoint(block, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_no_backward_writes_into_what_was_saved() -> None:
    inputs = block_inputs()
    loss = block(*inputs)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    twice = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def autograd_names(loss: Tensor) -> set[str]:
    """Names of all autograd nodes behind a tensor."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
    return {node.name() for node in seen}


def test_references_alone_give_the_same_block(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = block_inputs()
    loss = block(*inputs)
    fast = gradients(loss, inputs)
    assert [name for name in autograd_names(loss) if "chimed" in name]
    monkeypatch.setattr(backend, "FACE", "reference")

    loss = block(*inputs)
    slow = gradients(loss, inputs)
    assert not [name for name in autograd_names(loss) if "chimed" in name]
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


class Guarded(Tensor):
    """A subclass that has its own word on every op, as DTensor does."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"asked about {func}")


def test_a_subclass_of_tensor_meets_the_dispatcher_and_not_a_kernel() -> None:
    x = random(4, 16).as_subclass(Guarded)
    with pytest.raises(NotImplementedError, match=r"asked about chimed\.rms_norm"):
        rms_norm(x, random(16, seed=1), 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_start_where_their_tensors_are() -> None:
    x, weight = random(4, 16), random(16, seed=1)
    elsewhere = rms_norm(x.to("cuda:1"), weight.to("cuda:1"), 1e-6)
    assert torch.equal(elsewhere.to(x.device), rms_norm(x, weight, 1e-6))


def test_an_unknown_face_is_refused_with_the_known_ones() -> None:
    environment = {**os.environ, "CHIMED_KERNELS": "fast"}
    done = subprocess.run(
        [sys.executable, "-c", "import kernels.backend"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "CHIMED_KERNELS is 'fast'; it must be one of auto, triton, torch, reference" in done.stderr
