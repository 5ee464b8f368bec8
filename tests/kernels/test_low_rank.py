"""The linear layer with adapters: faces against a dense weight W + s B A, and what a frozen weight is spared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from kernels import backend
from kernels.backend import Chip
from kernels.low_rank import low_rank_linear, low_rank_linear_reference
from tests.kernels.faces import DEVICE, each_face, faces
from tests.kernels.oracle import assert_faithful, random

SCALE = 0.75


@dataclass(frozen=True)
class Layer:
    """Parts of the outputs, which of them have an adapter, and the rank of those; `tokens` rows of 24 numbers."""

    tokens: int
    sizes: tuple[int, ...]
    present: tuple[bool, ...]
    rank: int
    has_bias: bool = False

    def frozen(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        out = sum(self.sizes)
        return random(out, 24, seed=3, dtype=dtype), random(out, seed=4, dtype=dtype) if self.has_bias else None

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """x, a, b"""
        rows = sum(size for size, is_present in zip(self.sizes, self.present, strict=True) if is_present)
        shapes = (self.tokens, 24), (sum(self.present) * self.rank, 24), (rows, self.rank)
        return [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


LAYERS = [
    Layer(5, (37,), (True,), 3),
    Layer(130, (40, 20, 12), (True, True, True), 16, has_bias=True),  # two tiles of rows; queries, keys and values
    Layer(67, (130, 9, 140), (True, False, True), 8, has_bias=True),  # several blocks of a part, one without adapter
    Layer(66, (24, 600), (False, True), 32),
    Layer(70, (523, 5), (True, True), 1),
    Layer(4, (16, 16), (True, True), 64, has_bias=True),  # above the rank whose gradients are fused
    Layer(3, (30,), (True,), 72),  # more ranks than are multiplied at a time
    Layer(1, (24, 10), (True, True), 5),
    Layer(0, (24, 10), (True, True), 5),
]
layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.tokens}x{layer.sizes}r{layer.rank}")


def dense(layer: Layer, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + s B A, part by part."""
    deltas, rows = [], b.split([size for size, there in zip(layer.sizes, layer.present, strict=True) if there])
    adapters = iter(zip(rows, a.split(layer.rank), strict=True))
    for size, is_present in zip(layer.sizes, layer.present, strict=True):
        b_i, a_i = next(adapters) if is_present else (weight.new_zeros(size, 1), weight.new_zeros(1, 24))
        deltas.append(b_i @ a_i)
    return weight + SCALE * torch.cat(deltas)


@faces
@layers
def test_low_rank_linear_is_faithful_to_the_dense_weight(layer: Layer, face: str, dtype: torch.dtype) -> None:
    """In float64 the dense weight is the truth; in the dtype under test, where it would be rounded, the reference is
    the measure."""
    weight, bias = layer.frozen(dtype)

    def tested(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank_linear(x, weight, bias, a, b, SCALE, layer.sizes, layer.present)

    def expected(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        w, c = (None if t is None else t.to(x.dtype) for t in (weight, bias))
        if x.dtype == torch.float64:
            return F.linear(x, dense(layer, w, a, b), c)
        return low_rank_linear_reference(x, w, c, a, b, SCALE, layer.sizes, layer.present, None)

    assert_faithful(tested, expected, layer.inputs(dtype))


@faces
def test_adapters_may_read_something_else_than_the_weight_does(face: str, dtype: torch.dtype) -> None:
    layer = LAYERS[2]
    weight, bias = layer.frozen(dtype)
    x, a, b = layer.inputs(dtype)
    dropped = random(*x.shape, seed=9, dtype=dtype)

    def tested(x: Tensor, a: Tensor, b: Tensor, dropped: Tensor) -> Tensor:
        return low_rank_linear(x, weight, bias, a, b, SCALE, layer.sizes, layer.present, dropped)

    def expected(x: Tensor, a: Tensor, b: Tensor, dropped: Tensor) -> Tensor:
        w, c = weight.to(x.dtype), bias.to(x.dtype)
        if x.dtype == torch.float64:
            return F.linear(x, w, c) + F.linear(dropped, dense(layer, w, a, b) - w)
        return low_rank_linear_reference(x, w, c, a, b, SCALE, layer.sizes, layer.present, dropped)

    assert_faithful(tested, expected, [x, a, b, dropped])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own form")
@pytest.mark.parametrize("face", ["triton"], indirect=True)
def test_both_forms_of_the_backward_agree(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter passes for a Hopper chip; the form for Ampere has its product the other way round."""
    layer, found = Layer(150, (700, 20), (True, True), 8), []
    weight, _ = layer.frozen(torch.float16)
    for chip in (Chip(90, 3), Chip(80, 5)):
        monkeypatch.setattr(backend, "_pretended", chip)
        found.append(gradients(layer, weight, layer.inputs(torch.float16)))
    for hopper, ampere in zip(*found, strict=True):
        assert (hopper - ampere).norm() <= torch.finfo(torch.float16).eps * hopper.norm()


def gradients(layer: Layer, weight: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    x, a, b = (tensor.detach().requires_grad_() for tensor in inputs)
    y = low_rank_linear(x, weight, None, a, b, SCALE, layer.sizes, layer.present)
    return torch.autograd.grad(y, (x, a, b), random(*y.shape, seed=5, dtype=y.dtype))


@each_face
def test_gradients_repeat_to_the_bit(face: str) -> None:
    layer = LAYERS[2]
    weight, _ = layer.frozen(torch.float32)
    once, twice = (gradients(layer, weight, layer.inputs(torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@each_face
def test_gradients_that_lie_in_any_order_are_read_right(face: str) -> None:
    layer = LAYERS[1]
    weight, bias = layer.frozen(torch.float32)
    x, a, b = (tensor.requires_grad_() for tensor in layer.inputs(torch.float32))
    y = low_rank_linear(x, weight, bias, a, b, SCALE, layer.sizes, layer.present)
    dy = random(*reversed(y.shape), seed=5).t()
    found = torch.autograd.grad(y, (x, a, b), dy, retain_graph=True)
    for crooked, straight in zip(found, torch.autograd.grad(y, (x, a, b), dy.contiguous()), strict=True):
        assert torch.allclose(crooked, straight, rtol=1e-5, atol=1e-5)


@each_face
def test_without_b_the_layer_is_the_frozen_one(face: str) -> None:
    layer = LAYERS[1]
    weight, bias = layer.frozen(torch.float32)
    x, a, b = layer.inputs(torch.float32)
    y = low_rank_linear(x, weight, bias, a, torch.zeros_like(b), SCALE, layer.sizes, layer.present)
    assert torch.allclose(y, F.linear(x, weight, bias), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_dropped", [False, True])
def test_the_face_passes_gradcheck(is_dropped: bool) -> None:
    layer = Layer(5, (4, 3, 2), (True, False, True), 2, has_bias=True)
    weight, bias = layer.frozen(torch.float64)
    inputs = [tensor.requires_grad_() for tensor in layer.inputs(torch.float64)]
    inputs += [random(5, 24, seed=9, dtype=torch.float64).requires_grad_()] * is_dropped

    def call(x: Tensor, a: Tensor, b: Tensor, dropped: Tensor | None = None) -> Tensor:
        return low_rank_linear(x, weight, bias, a, b, SCALE, layer.sizes, layer.present, dropped)

    assert gradcheck(call, inputs)


@each_face
def test_inputs_that_need_no_gradient_cost_no_large_product(face: str) -> None:
    """The first layer above a frozen embedding: only the adapters learn, and dy W is never formed."""
    layer = Layer(6, (40, 40), (True, True), 2)
    weight, _ = layer.frozen(torch.float32)
    x, a, b = layer.inputs(torch.float32)
    y = low_rank_linear(x, weight, None, a.requires_grad_(), b.requires_grad_(), SCALE, layer.sizes)
    with torch.profiler.profile(record_shapes=True) as profile:
        da, db = torch.autograd.grad(y, (a, b), torch.ones_like(y))
    assert da.shape == a.shape and db.shape == b.shape
    assert not [event for event in profile.events() if [40 + 40, 24] in event.input_shapes]


@each_face
def test_only_what_the_backward_reads_is_kept(face: str) -> None:
    layer = Layer(50, (40, 40), (True, True), 2)
    weight, bias = layer.frozen(torch.float32)
    x, a, b = (tensor.requires_grad_() for tensor in layer.inputs(torch.float32))
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        low_rank_linear(x, weight, bias, a, b, SCALE, layer.sizes)
    assert sorted(kept) == sorted([x.shape, weight.shape, a.shape, b.shape, torch.Size([50, 4])])


def test_one_graph_holds_it_under_compile() -> None:
    layer = Layer(6, (40, 20), (True, False), 2, has_bias=True)
    weight, bias = layer.frozen(torch.float32)
    inputs = [tensor.requires_grad_() for tensor in layer.inputs(torch.float32)]

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank_linear(x, weight, bias, a, b, SCALE, layer.sizes, layer.present)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    plain, found = call(*inputs), compiled(*inputs)
    assert torch.equal(found, plain)
    dy = random(*plain.shape, seed=5)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, dy) for y in (found, plain)), strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_fit_is_refused() -> None:
    layer = Layer(3, (6, 4), (True, True), 2)
    weight, _ = layer.frozen(torch.float32)
    x, a, b = layer.inputs(torch.float32)

    def call(**changed) -> Tensor:
        given = {"x": x, "weight": weight, "bias": None, "a": a, "b": b, "scale": 1.0, "sizes": (6, 4)} | changed
        return low_rank_linear(**given)

    assert call().shape == (3, 10)
    for changed, meant in (
        ({"x": x[:, :5]}, "do not fit"),
        ({"bias": torch.zeros(9, device=DEVICE)}, "bias"),
        ({"sizes": (6, 3)}, "parts"),
        ({"present": (True,)}, "parts"),
        ({"present": (True, False)}, "for parts"),
        ({"a": a[:3]}, "for parts"),
        ({"dropped": x[:2]}, "dropped"),
        ({"a": a.double()}, "float64"),
        ({"weight": weight.clone().requires_grad_()}, "frozen"),
    ):
        with pytest.raises(ValueError, match=meant):
            call(**changed)
