"""AdamW against torch's own in float64, and lists of tensors however they are cut and wherever they lie."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.adamw import adamw, adamw_reference
from kernels.rounding import stochastic_bfloat16_reference
from tests.kernels.faces import DEVICE, each_face
from tests.kernels.oracle import random
from tests.kernels.updates import (
    DECAYS,
    LR,
    OPTIONS,
    SHAPES,
    SIZES,
    copies,
    cut,
    halves_of,
    same_bits,
    scalars,
    shadows_of,
    state,
)

triton = pytest.mark.parametrize("face", ["triton"], indirect=True)


def torchs(dtype: torch.dtype, grads: list[list[Tensor]], clip_scale: float, betas: tuple[float, float]) -> Tensor:
    """All parameters after some steps of torch.optim.AdamW in a dtype."""
    params = [torch.nn.Parameter(x) for x in state(dtype)[0]]
    groups = [{"params": [param], "weight_decay": decay} for param, decay in zip(params, DECAYS, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=betas, eps=OPTIONS["eps"], foreach=False)
    for of_step in grads:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = clip_scale * grad.to(dtype)
        optimizer.step()
    return torch.cat([param.detach().flatten() for param in params])


@each_face
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.25)], ids=str)
def test_adamw_errs_no_more_than_torchs_own(face: str, grad_dtype: torch.dtype, betas: tuple[float, float]) -> None:
    grads = [
        [random(*shape, seed=99 * step + i, dtype=grad_dtype) for i, shape in enumerate(SHAPES)] for step in range(4)
    ]
    truth, plain = (torchs(dtype, grads, 0.375, betas) for dtype in (torch.float64, torch.float32))
    params = state()[0]
    moments = [[torch.zeros_like(x) for x in params] for _ in range(2)]
    for step, of_step in enumerate(grads, start=1):
        adamw(params, copies(of_step)[0], *moments, **{**OPTIONS, "betas": betas}, **scalars(step))
    ours = torch.cat([param.flatten() for param in params])
    allowed = 2 * (plain - truth).norm() + 4 * torch.finfo(torch.float32).eps * truth.norm()
    assert (ours - truth).norm() <= allowed


@each_face
def test_moments_and_later_steps_are_as_close_to_float64_as_the_reference_is(face: str) -> None:
    ours, plain, truth = state(), state(), state(torch.float64)
    for step in range(1000, 1003):
        for run, tensors in ((adamw, ours), (adamw_reference, plain), (adamw_reference, truth)):
            tensors[1] = [random(*shape, seed=step + i).to(tensors[0][0].dtype) for i, shape in enumerate(SHAPES)]
            run(*tensors, **OPTIONS, **scalars(step))
    for k in (0, 2, 3):
        a, b, true = (torch.cat([x.flatten() for x in tensors[k]]) for tensors in (ours, plain, truth))
        assert (a - true).norm() <= 2 * (b - true).norm() + 4 * torch.finfo(a.dtype).eps * true.norm()


@each_face
def test_a_beta_of_zero_keeps_nothing_of_earlier_gradients(face: str) -> None:
    """Not even their rounding errors: here they were 1e12 times as large."""
    params, grads, first, second = state()
    for moment in (*first, *second):
        moment.fill_(1e12)
    adamw(params, copies(grads)[0], first, second, **{**OPTIONS, "betas": (0.0, 0.0)}, **scalars(clip_scale=1.0))
    for grad, m, v in zip(grads, first, second, strict=True):
        assert torch.equal(m, grad) and torch.equal(v, grad.square())


def test_the_reference_is_torchs_own_adamw() -> None:
    grads = [[random(*shape, seed=step) for shape in SHAPES] for step in range(4)]
    params = state(torch.float64)[0]
    moments = [[torch.zeros_like(x) for x in params] for _ in range(2)]
    for step, of_step in enumerate(grads, start=1):
        adamw_reference(params, [g.double() for g in of_step], *moments, **OPTIONS, **scalars(step))
    ours = torch.cat([param.flatten() for param in params])
    theirs = torchs(torch.float64, grads, 0.375, OPTIONS["betas"])
    assert (ours - theirs).abs().max() <= 64 * torch.finfo(torch.float64).eps * theirs.abs().max()


@triton
def test_how_a_list_is_cut_and_where_its_tensors_lie_changes_no_bit(face: str) -> None:
    total = sum(SIZES)
    flat = [random(total, seed=i) for i in range(4)]
    flat[3].square_()
    shadow = torch.empty(total, dtype=torch.bfloat16, device=DEVICE)
    options = {**OPTIONS, "weight_decay": 0.1, "rounding_seed": 5}
    pieces = [cut(x.clone(), SIZES) for x in (*flat, shadow)]
    assert any(x.data_ptr() % 16 for x in pieces[0])
    adamw(*([x] for x in flat), shadows=[shadow], **options, **scalars())
    adamw(*pieces[:4], shadows=pieces[4], **options, **scalars())
    for whole, parts in zip((flat[0], flat[2], flat[3], shadow), (pieces[0], *pieces[2:]), strict=True):
        assert same_bits([whole], [torch.cat(parts)])


@triton
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("beside", ["shadows", "remainders"])
def test_one_list_that_is_not_aligned_changes_no_bit(
    face: str, beside: Literal["shadows", "remainders"], which: int
) -> None:
    """Gradients of FSDP2 lie so: views into one buffer, beside aligned parameters."""
    lists = [[random(5000, seed=i)] for i in range(4)]
    lists[3][0].square_()
    if beside == "shadows":
        lists += [shadows_of(lists[0])]
    else:
        lists[0], remainders = halves_of(lists[0])
        lists += [remainders]
    moved = copies(*lists)
    buffer = lists[which][0].new_empty(5001)
    moved[which] = [buffer[1:].copy_(lists[which][0])]
    for tensors in (lists, moved):
        adamw(*tensors[:4], **{beside: tensors[4]}, **{**OPTIONS, "weight_decay": 0.1}, **scalars())
    assert moved[which][0].data_ptr() % 16
    assert all(same_bits(one, other) for one, other in zip(lists, moved, strict=True))


@each_face
@pytest.mark.parametrize("gradient", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("should_skip", [1.0, 3, True, float("nan")], ids=str)
def test_a_skipped_step_changes_no_bit(face: str, gradient: float, should_skip: float) -> None:
    params, _, first, second = state()
    grads = [torch.full_like(param, gradient) for param in params]
    written = params, first, second, [shadow.fill_(7) for shadow in shadows_of(params)]
    before = copies(*written)
    given = scalars(step=0, clip_scale=gradient, should_skip=should_skip)
    adamw(params, grads, first, second, shadows=written[3], rounding_seed=1, **OPTIONS, **given)
    adamw_reference(params, grads, first, second, shadows=written[3], **OPTIONS, **given)
    assert all(same_bits(one, other) for one, other in zip(before, written, strict=True))


@each_face
def test_shadows_are_the_new_parameters_rounded_to_nearest(face: str) -> None:
    lists = state()
    shadows = shadows_of(lists[0])
    adamw(*lists, shadows=shadows, **OPTIONS, **scalars())
    assert same_bits(shadows, [param.bfloat16() for param in lists[0]])


@each_face
def test_shadows_are_rounded_at_random_by_place_in_the_list(face: str) -> None:
    lists = state()
    shadows = shadows_of(lists[0])
    adamw(*lists, shadows=shadows, rounding_seed=11, **OPTIONS, **scalars(step=9))
    place, step = 0, torch.tensor(9, device=DEVICE)
    for param, shadow in zip(lists[0], shadows, strict=True):
        assert same_bits([shadow], [stochastic_bfloat16_reference(param, 11, place, step)])
        place += param.numel()


@each_face
def test_shadows_do_not_change_the_update(face: str) -> None:
    one, other = state(), state()
    adamw(*one, **OPTIONS, **scalars())
    adamw(*other, shadows=shadows_of(other[0]), rounding_seed=1, **OPTIONS, **scalars())
    assert all(same_bits(one[k], other[k]) for k in (0, 2, 3))


@triton
def test_the_kernel_reads_gradients_only(face: str) -> None:
    params, grads, first, second = state()
    columns = grads[5].t().contiguous().t()  # the same numbers, another layout
    before = copies(grads)[0]
    twin = state()
    adamw(params, [*grads[:5], columns, *grads[6:]], first, second, **OPTIONS, **scalars())
    adamw(*twin, **OPTIONS, **scalars())
    assert same_bits(before, grads) and same_bits(params, twin[0])


@triton
def test_thousands_of_tensors_are_one_launch(face: str) -> None:
    launches = []
    lists = [[torch.ones(3, device=DEVICE)] * 3000 for _ in range(4)]
    with backend.observed_launches(lambda *launch: launches.append(launch), backend.Chip(90, 132)):
        adamw(*lists, **{**OPTIONS, "weight_decay": [0.1] * 3000}, **scalars())
    assert [grid for _, grid, _, _ in launches] == [(3000,)]


@each_face
def test_lists_that_do_not_fit_are_refused(face: str) -> None:
    params, grads, first, second = state()
    with pytest.raises(ValueError, match="7 grads"):
        adamw(params, grads[:7], first, second, **OPTIONS, **scalars())
    with pytest.raises(ValueError, match="tensor 1: shapes"):
        adamw(params, [grads[0], grads[0], *grads[2:]], first, second, **OPTIONS, **scalars())
    with pytest.raises(ValueError, match="2 weight decays"):
        adamw(params, grads, first, second, **{**OPTIONS, "weight_decay": [0.1, 0.2]}, **scalars())
    with pytest.raises(ValueError, match="3 shadows"):
        adamw(params, grads, first, second, shadows=shadows_of(params[:3]), **OPTIONS, **scalars())
    with pytest.raises(ValueError, match="there are none"):
        adamw(params, grads, first, second, rounding_seed=1, **OPTIONS, **scalars())


@triton
def test_memory_that_the_kernel_would_misread_is_refused(face: str) -> None:
    params, grads, first, second = state()
    with pytest.raises(ValueError, match="must be fp32"):
        adamw(params, grads, [x.half() for x in first], second, **OPTIONS, **scalars())
    with pytest.raises(ValueError, match="of one dtype"):
        adamw(params, [*grads[:7], grads[7].bfloat16()], first, second, **OPTIONS, **scalars())
    with pytest.raises(ValueError, match="shadows bf16"):
        adamw(params, grads, first, second, shadows=[x.half() for x in params], **OPTIONS, **scalars())
    with pytest.raises(ValueError, match="params fp32"):
        adamw([x.bfloat16() for x in params], grads, first, second, **OPTIONS, **scalars())
    params[5] = params[5].t().contiguous().t()
    with pytest.raises(ValueError, match="contiguous"):
        adamw(params, grads, first, second, **OPTIONS, **scalars())


@each_face
def test_nothing_to_update_is_no_work(face: str) -> None:
    given = scalars()
    adamw([], [], [], [], **{**OPTIONS, "weight_decay": 0.1}, **given)
    empty = [[torch.empty(0, 4, device=DEVICE)] * 2 for _ in range(4)]
    adamw(*empty, **{**OPTIONS, "weight_decay": 0.1}, **given)
    assert all(torch.equal(given[name], value) for name, value in scalars().items())
