"""Weights in 16 bits whose gradients are kept in fp32: a product adds its own, what other ops give autograd adds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from kernels import backend
from kernels.fp8_linear import fp8_linear
from kernels.linear import _LinearIntoGradient, linear, linear_reference
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_logprob import linear_logprob
from kernels.low_rank import low_rank_linear
from kernels.recipes import recipes_kept
from kernels.rms_norm import add_rms_norm, rms_norm
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

BF16 = torch.bfloat16
NARROW = (BF16, torch.float16)
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)
# Tokens, in, out: no two tensors of a layer's passes have the same number of elements.
T, IN, OUT = 5, 7, 11


def wide(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    """A weight whose gradient is kept in fp32."""
    weight = random(*shape, seed=seed, dtype=dtype).requires_grad_()
    weight.grad_dtype = torch.float32
    return weight


def products(passes: int, tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(x, dy) of each backward pass."""
    out, width = shape
    return [
        (random(tokens, width, seed=2 * i, dtype=dtype), random(tokens, out, seed=2 * i + 1, dtype=dtype))
        for i in range(1, passes + 1)
    ]


def excess(weight: Tensor, read: list[tuple[Tensor, Tensor]]) -> float:
    """By how much the gradient is farther from the truth than fp32 sums of exact products can be, whatever the order.

    Products of two numbers of 16 bits have at most 22 places. A sum of n of them errs by at most (n - 1) u times
    the sum of their magnitudes, u = 2^-24 (Higham 2002, section 4.2), to first order; n and 2^-23 cover the rest.
    """
    truth, size = (sum(g(dy.double()).t() @ g(x.double()) for x, dy in read) for g in (lambda a: a, torch.abs))
    count = sum(len(x) for x, _ in read)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    return float(((weight.grad - truth).abs() - count * 2**-23 * size).max())


def add_up(layer: Callable[..., Tensor], weight: Tensor, read: list[tuple[Tensor, Tensor]]) -> Tensor:
    for x, dy in read:
        layer(x, weight).backward(dy)
    return weight


@settings(deadline=None, max_examples=30)
@given(
    passes=st.integers(1, 4),
    tokens=st.integers(0, 33),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(NARROW),
)
def test_sums_over_passes_are_those_of_fp32(
    passes: int, tokens: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    read = products(passes, tokens, shape, dtype)
    assert excess(add_up(linear, wide(*shape, dtype=dtype), read), read) <= 0


@narrow
@pytest.mark.parametrize("passes", [1, 4])
def test_sums_of_what_is_rounded_before_it_is_added_are_not(passes: int, dtype: torch.dtype) -> None:
    read = products(passes, 33, (40, 40), dtype)
    assert excess(add_up(linear_reference, wide(40, 40, dtype=dtype), read), read) > 0


@narrow
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_result_and_the_gradient_of_x_are_the_bits_they_are_elsewhere(has_bias: bool, dtype: torch.dtype) -> None:
    ((x, dy),) = products(1, T, (OUT, IN), dtype)
    bias = random(OUT, seed=9, dtype=dtype) if has_bias else None
    weight = wide(OUT, IN, dtype=dtype)
    (x, y), (plain_x, plain_y) = (
        (x, layer(x, weight, bias))
        for layer, x in ((linear, x.clone().requires_grad_()), (linear_reference, x.clone().requires_grad_()))
    )
    y.backward(dy)
    plain_y.backward(dy)
    assert torch.equal(y, plain_y) and x.grad is not None and torch.equal(x.grad, plain_x.grad)


@narrow
def test_a_bias_whose_gradient_is_wide_gets_it_unrounded(dtype: torch.dtype) -> None:
    read = products(2, 65, (OUT, IN), dtype)
    bias = wide(OUT, seed=9, dtype=dtype)
    for x, dy in read:
        linear(x, wide(OUT, IN, dtype=dtype), bias).backward(dy)
    truth = sum(dy.double().sum(0) for _, dy in read)
    size = sum(dy.double().abs().sum(0) for _, dy in read)
    assert bias.grad.dtype == torch.float32
    assert ((bias.grad - truth).abs() <= 2 * 65 * 2**-23 * size).all()


def test_a_bias_whose_gradient_is_narrow_gets_it_narrow() -> None:
    ((x, dy),) = products(1, T, (OUT, IN), BF16)
    bias = random(OUT, seed=9, dtype=BF16).requires_grad_()
    linear(x, wide(OUT, IN), bias).backward(dy)
    assert bias.grad.dtype == BF16 and torch.equal(bias.grad, dy.sum(0))


class Results(TorchDispatchMode):
    """Every op and what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = op(*args, **(kwargs or {}))
        self.log.append((str(op), [x for x in tree_leaves(result) if isinstance(x, Tensor)]))
        return result


def test_the_product_writes_the_gradient_where_it_is_kept_and_nothing_of_the_weights_size_in_16_bits() -> None:
    weight = wide(OUT, IN)
    addresses = []
    for x, dy in products(3, T, (OUT, IN), BF16):
        y = linear(x.requires_grad_(), weight)
        with Results() as results:
            y.backward(dy)
        address = weight.grad.data_ptr()
        writers = [op for op, made in results.log for r in made if r.data_ptr() == address and "mm" in op]
        addresses.append((*writers, address))
        views = ("t", "transpose", "detach", "alias")
        fresh = [(op, r) for op, made in results.log for r in made if op.split(".")[1] not in views]
        assert not [op for op, r in fresh if r.dtype == BF16 and r.numel() == weight.numel()]
    kept = addresses[0][-1]
    assert [name.split(".")[1] for name, _ in addresses] == ["mm", "addmm", "addmm"]
    assert {address for _, address in addresses} == {kept}


def test_an_x_without_a_gradient_costs_no_product() -> None:
    ((x, dy),) = products(1, T, (OUT, IN), BF16)
    y = linear(x, wide(OUT, IN))
    with Results() as results:
        y.backward(dy)
    assert [op for op, _ in results.log if "mm" in op] == ["aten.mm.out"]


def test_a_weight_that_is_read_twice_gets_both_gradients() -> None:
    weight, (first, second) = wide(OUT, IN), products(2, T, (OUT, IN), BF16)
    torch.autograd.backward([linear(x, weight) for x, _ in (first, second)], [first[1], second[1]])
    assert excess(weight, [first, second]) <= 0


def test_what_other_ops_read_of_the_weight_is_added_too() -> None:
    """As an embedding does that is tied to a linear layer."""
    weight, ((x, dy),) = wide(OUT, IN), products(1, T, (OUT, IN), BF16)
    rows = torch.tensor([3, 1, 3], device=DEVICE)
    for _ in range(2):
        torch.autograd.backward([linear(x, weight), F.embedding(rows, weight).sum()], [dy, None])
    alone = add_up(linear, wide(OUT, IN), [(x, dy)] * 2).grad
    counts = torch.bincount(rows, minlength=OUT).float().unsqueeze(1)
    assert (weight.grad - alone - 2 * counts).abs().max() <= 2**-20


def passes_of(x: Tensor, y: Callable[..., Tensor]) -> Tensor:
    weight = wide(OUT, IN)
    for _ in range(2):
        y(x, weight).float().square().sum().backward()
    return weight.grad


def test_recipes_are_followed() -> None:
    x, norm = random(T, IN, dtype=BF16).requires_grad_(), random(IN, seed=2, dtype=BF16)
    kept = passes_of(x, lambda x, weight: linear(rms_norm(x, norm, 1e-6), weight))
    dx, x.grad = x.grad, None
    with recipes_kept():
        read = rms_norm(x, norm, 1e-6)
        storage = StorageWeakRef(read.untyped_storage())
        y = linear(read, wide(OUT, IN))
        del read
        assert storage.expired()
        del y
        made_again = passes_of(x, lambda x, weight: linear(rms_norm(x, norm, 1e-6), weight))
    assert torch.equal(kept, made_again) and torch.equal(dx, x.grad)


def test_checkpoints_compute_it_again() -> None:
    x = random(T, IN, dtype=BF16).requires_grad_()

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return linear(torch.tanh(x), weight)

    assert torch.equal(
        passes_of(x, layer), passes_of(x, lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False))
    )


def test_a_compiled_graph_leaves_the_sum_to_autograd() -> None:
    x = random(T, IN, dtype=BF16).requires_grad_()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(passes_of(x, compiled), passes_of(x, linear_reference))
    assert passes_of(x, compiled).dtype == torch.float32


def test_tensors_without_values_have_gradients_without() -> None:
    with FakeTensorMode():
        weight = wide_and_empty("cpu")
        for _ in range(2):
            x = torch.empty(T, IN, dtype=BF16, requires_grad=True)
            linear(x, weight).sum().backward()
            assert weight.grad.dtype == torch.float32 and weight.grad.shape == weight.shape
            assert x.grad.dtype == BF16 and x.grad.shape == x.shape


def test_elsewhere_operands_stay_narrow() -> None:
    """PyTorch's meta device has the rules of a GPU's products, and no values."""
    weight = wide_and_empty("meta")
    for _ in range(2):
        with Results() as results:
            linear(torch.empty(T, IN, dtype=BF16, device="meta"), weight).sum().backward()
        assert not [op for op, _ in results.log if "_to_copy" in op]
        assert weight.grad.dtype == torch.float32 and weight.grad.shape == weight.shape


def wide_and_empty(device: str) -> Tensor:
    weight = torch.empty(OUT, IN, dtype=BF16, device=device, requires_grad=True)
    weight.grad_dtype = torch.float32
    return weight


def graph_of(y: Tensor) -> str:
    return type(y.grad_fn).__name__


def test_all_others_keep_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(T, IN, dtype=BF16).requires_grad_()
    assert graph_of(linear(x, wide(OUT, IN))) == "_LinearIntoGradientBackward"

    plain = random(OUT, IN, dtype=BF16).requires_grad_()
    frozen = wide(OUT, IN).requires_grad_(False)
    narrow_sum = random(OUT, IN).requires_grad_()
    narrow_sum.grad_dtype = BF16
    for weight in (plain, frozen, wide(OUT, IN) * 1):
        assert graph_of(linear(x, weight)) == graph_of(linear_reference(x, weight))
    assert graph_of(linear(x.float(), narrow_sum)) == graph_of(linear(x.float(), random(OUT, IN).requires_grad_()))
    y = linear(x, frozen)
    y.sum().backward()
    assert frozen.grad is None and x.grad is not None

    monkeypatch.setattr(backend, "FACE", "reference")
    assert graph_of(linear(x, wide(OUT, IN))) == graph_of(linear_reference(x, plain))


def test_without_gradients_no_function_of_autograd_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding calls products of few rows, one after the other."""
    monkeypatch.delattr(_LinearIntoGradient, "forward")
    x, weight = random(T, IN, dtype=BF16), wide(OUT, IN)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), linear_reference(x, weight))
    with pytest.raises(NotImplementedError):
        linear(x, weight)


def test_a_weight_that_changed_between_the_passes_is_found() -> None:
    weight, x = wide(OUT, IN), random(T, IN, dtype=BF16).requires_grad_()
    y = linear(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


TARGETS = torch.tensor([0, 4, -100, 2, 1], device=DEVICE)
ROWS = torch.tensor([3, 1, 3], device=DEVICE)
X = random(T, 16, seed=5, dtype=BF16)
# Ops and the shapes of the weights they read.
OTHERS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "embedding": (lambda weight: F.embedding(ROWS, weight), [(OUT, 16)]),
    "rms_norm": (lambda weight: rms_norm(X, weight, 1e-6), [(16,)]),
    "add_rms_norm": (lambda weight: add_rms_norm(X, X, weight, 1e-6)[0], [(16,)]),
    "linear_cross_entropy": (lambda weight: linear_cross_entropy(X, weight, TARGETS)[0], [(OUT, 16)]),
    "linear_logprob": (lambda weight: linear_logprob(X, weight, TARGETS)[0], [(OUT, 16)]),
    "fp8_linear": (lambda weight: fp8_linear(X, weight), [(32, 16)]),
    "low_rank_linear": (
        lambda a, b: low_rank_linear(X, random(OUT, 16, dtype=BF16), None, a, b, 0.5, (6, 5)),
        [(4, 16), (OUT, 2)],
    ),
}


@pytest.mark.parametrize(("op", "shapes"), OTHERS.values(), ids=OTHERS)
def test_what_other_ops_give_is_widened_and_added(op: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    weights = [random(*shape, seed=i, dtype=BF16).requires_grad_() for i, shape in enumerate(shapes)]
    sums = [wide(*shape, seed=i) for i, shape in enumerate(shapes)]
    dys = [random(*op(*sums).shape, seed=seed, dtype=op(*sums).dtype) for seed in (7, 8)]
    expected = [torch.autograd.grad(op(*weights), weights, dy) for dy in dys]
    for dy in dys:
        op(*sums).backward(dy)
    for weight, first, second in zip(sums, *expected, strict=True):
        assert weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad, first.float() + second.float())
