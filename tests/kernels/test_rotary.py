"""Rotary embedding: faces against references, out of a fused product or not, and tokens that keep to themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kernels.rotary import rotary, rotary_reference, split_rotary, split_rotary_reference
from tests.kernels.faces import DEVICE, each_face, faces
from tests.kernels.oracle import assert_faithful, random

# T, H, K, h: one pair; several tiles; heads of 80 and 96, which no power of two holds; a prime half; no tokens; one
# token of heads that fill more than a tile.
SHAPES = [(1, 1, 1, 2), (11, 4, 2, 32), (37, 3, 1, 80), (9, 5, 5, 96), (13, 2, 1, 62), (0, 2, 1, 8), (1, 40, 8, 128)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def angles(tokens: int, width: int) -> dict[str, Tensor]:
    """positions, cos, sin: positions restart, as in a pack, and leave rows of the tables out."""
    turns = random(tokens + 5, width // 2, seed=9)
    positions = (torch.arange(tokens, device=DEVICE) % max(1, tokens // 2)) + 2
    return {"positions": positions, "cos": turns.cos(), "sin": turns.sin()}


@faces
@shapes
def test_rotary_is_faithful(shape: tuple[int, int, int, int], face: str, dtype: torch.dtype) -> None:
    T, H, K, h = shape
    inputs = random(T, H, h, dtype=dtype), random(T, K, h, seed=1, dtype=dtype)
    assert_faithful(partial(rotary, **angles(T, h)), partial(rotary_reference, **angles(T, h)), inputs)


@faces
@shapes
def test_split_rotary_is_faithful(shape: tuple[int, int, int, int], face: str, dtype: torch.dtype) -> None:
    T, H, K, h = shape
    ours = partial(split_rotary, heads=H, kv_heads=K, **angles(T, h))
    plain = partial(split_rotary_reference, heads=H, kv_heads=K, **angles(T, h))
    assert_faithful(ours, plain, [random(T, H + 2 * K, h, dtype=dtype)])


@faces
def test_rotary_takes_heads_out_of_a_wider_product(face: str, dtype: torch.dtype) -> None:
    def of_product(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda qkv: op(qkv[:, 1:5], qkv[:, 5:7], **angles(11, 32))

    qkv = random(11, 9, 32, dtype=dtype)
    assert_faithful(of_product(rotary), of_product(rotary_reference), [qkv])
    assert all(x.is_contiguous() for x in of_product(rotary)(qkv))


@each_face
def test_inputs_that_lie_in_any_order_are_read_right(face: str) -> None:
    turns = angles(11, 32)
    wide = {"cos": turns["cos"].t().contiguous().t(), "sin": turns["sin"].t().contiguous().t()}
    positions = turns["positions"].repeat_interleave(2)[::2]
    qkv = random(8, 32, 11).permute(2, 0, 1)  # tokens last in memory
    spread = random(11, 8, 64)[:, :, :32]  # heads that do not lie side by side
    for product in (qkv, spread):
        packed = split_rotary(product.contiguous(), 4, 2, **turns)
        assert all(map(torch.equal, split_rotary(product, 4, 2, positions, **wide), packed))
        assert all(map(torch.equal, rotary(product[:, :4], product[:, 4:6], positions, **wide), packed[:2]))


@faces
def test_what_is_split_off_lies_in_memory_of_its_own(face: str, dtype: torch.dtype) -> None:
    """Whoever keeps the values for later must not keep the whole product with them."""
    qkv = random(11, 8, 32, dtype=dtype)
    parts = split_rotary(qkv, 4, 2, **angles(11, 32))
    assert torch.equal(parts[2], qkv[:, 6:])
    assert len({x.untyped_storage().data_ptr() for x in (qkv, *parts)}) == 4
    for part in parts:
        assert part.is_contiguous() and part.untyped_storage().nbytes() == part.numel() * part.itemsize


@each_face
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_gradients_that_did_not_arrive_count_as_zero(used: tuple[int, ...], face: str) -> None:
    qkv = random(11, 8, 32).requires_grad_()
    turns = angles(11, 32)

    def gradient(results: tuple[Tensor, ...]) -> Tensor:
        upstream = [random(*results[i].shape, seed=i) for i in used]
        return torch.autograd.grad([results[i] for i in used], qkv, upstream)[0]

    ours = gradient(split_rotary(qkv, 4, 2, **turns))
    plain = gradient(split_rotary_reference(qkv, 4, 2, **turns))
    assert torch.allclose(ours, plain, rtol=0, atol=1e-6)
    if 2 not in used:
        q, k, v = qkv.split((4, 2, 2), dim=1)
        assert torch.allclose(gradient((*rotary(q, k, **turns), v)), plain, rtol=0, atol=1e-6)


@each_face
def test_the_backward_turns_back(face: str) -> None:
    qkv = random(11, 8, 32).requires_grad_()
    parts = split_rotary(qkv, 4, 2, **angles(11, 32))
    (back,) = torch.autograd.grad(parts, qkv, [part.detach() for part in parts])
    assert torch.allclose(back, qkv, rtol=0, atol=1e-6)


@each_face
def test_each_pair_is_turned_by_the_angle_of_its_position(face: str) -> None:
    angle = torch.tensor([[0.0], [0.3]], device=DEVICE)
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], device=DEVICE)
    turned, _ = rotary(q, q, torch.tensor([1, 1], device=DEVICE), angle.cos(), angle.sin())
    cos, sin = angle[1].cos(), angle[1].sin()
    expected = torch.stack((torch.cat((cos, sin)), torch.cat((-sin, cos))))
    assert torch.allclose(turned[:, 0], expected)


@faces
def test_a_token_alone_and_among_others_is_bitwise_the_same(face: str, dtype: torch.dtype) -> None:
    turns = angles(41, 48)

    def run(rows: slice) -> tuple[Tensor, ...]:
        qkv = random(41, 8, 48, dtype=dtype)[rows].requires_grad_()
        parts = split_rotary(qkv, 4, 2, turns["positions"][rows], turns["cos"], turns["sin"])
        upstream = [random(41, *part.shape[1:], seed=1 + i, dtype=dtype)[rows] for i, part in enumerate(parts)]
        return *parts, *torch.autograd.grad(parts, qkv, upstream)

    together = run(slice(0, 41))
    for rows in (slice(13, 14), slice(20, 41)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), together, strict=True))


def test_the_references_pass_gradcheck_and_so_do_the_faces() -> None:
    q, k = (random(5, heads, 6, seed=heads, dtype=torch.float64).requires_grad_() for heads in (2, 1))
    qkv = random(5, 4, 6, seed=4, dtype=torch.float64).requires_grad_()
    turns = {name: x.double() if x.is_floating_point() else x for name, x in angles(5, 6).items()}
    for op in (rotary, rotary_reference):
        assert gradcheck(partial(op, **turns), (q, k))
    for op in (split_rotary, split_rotary_reference):
        assert gradcheck(partial(op, heads=2, kv_heads=1, **turns), (qkv,))


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, qkv = random(3, 2, 4), random(3, 8, 4)
    turns = angles(3, 4)
    with pytest.raises(ValueError, match="do not fit"):
        rotary(q, q[:2], **turns)
    with pytest.raises(ValueError, match="do not fit"):
        rotary(q, q.half(), **turns)
    with pytest.raises(ValueError, match="positions"):
        rotary(q, q, **{**turns, "positions": turns["positions"][:2]})
    with pytest.raises(ValueError, match="positions"):
        split_rotary(qkv, 4, 2, **{**turns, "positions": turns["positions"][:2]})
    with pytest.raises(ValueError, match="tables"):
        rotary(q, q, **{**turns, "cos": random(3, 4)})
    with pytest.raises(ValueError, match="tables"):
        split_rotary(random(3, 8, 5), 4, 2, **turns)
    with pytest.raises(ValueError, match="4 heads of queries and 1"):
        split_rotary(qkv, 4, 1, **turns)
    with pytest.raises(ValueError, match="8 heads of queries and 0"):
        split_rotary(qkv, 8, 0, **turns)
