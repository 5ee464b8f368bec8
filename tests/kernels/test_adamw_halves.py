"""AdamW on masters in two halves: what it does to whole ones, bit for bit."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.adamw
from kernels.adamw import adamw
from kernels.masters import join_master
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random
from tests.kernels.updates import OPTIONS, SHAPES, copies, halves_of, same_bits, scalars, shadows_of, state

# Fused on a GPU, torch's own may round a long list otherwise than a short one.
every_face = pytest.mark.parametrize(
    "face", ["reference", "triton"] if DEVICE == "cuda" else ["reference", "torch", "triton"], indirect=True
)


@every_face
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masters_in_halves_take_the_bits_that_whole_ones_take(face: str, grad_dtype: torch.dtype) -> None:
    masters, _, *moments = state()
    moments_of_halves = copies(*moments)
    before, (params, remainders) = copies(masters)[0], halves_of(masters)
    for step in range(1, 4):
        grads = [random(*shape, seed=99 * step + i, dtype=grad_dtype) for i, shape in enumerate(SHAPES)]
        adamw(masters, copies(grads)[0], *moments, **OPTIONS, **scalars(step))
        adamw(params, copies(grads)[0], *moments_of_halves, remainders=remainders, **OPTIONS, **scalars(step))
        assert all(map(torch.equal, map(join_master, params, remainders), masters))
        assert same_bits(params + remainders, [x for halves in halves_of(masters) for x in halves])
        assert all(same_bits(one, other) for one, other in zip(moments, moments_of_halves, strict=True))
    assert all(not (one == other).any() for one, other in zip(before, masters, strict=True))


@every_face
@pytest.mark.parametrize("should_skip", [1.0, float("nan")], ids=str)
def test_a_skipped_step_changes_no_bit_of_halves_not_even_of_nan(face: str, should_skip: float) -> None:
    _, grads, first, second = state()
    generator = torch.Generator().manual_seed(0)
    weights, remainders = (
        [torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).to(DEVICE) for shape in SHAPES]
        for _ in range(2)
    )
    params = [bits.view(torch.bfloat16) for bits in weights]
    assert params[-1].isnan().any()
    written = params, remainders, first, second
    before = copies(*written)
    given = scalars(step=0, clip_scale=float("nan"), should_skip=should_skip)
    adamw(params, grads, first, second, remainders=remainders, **OPTIONS, **given)
    assert all(same_bits(one, other) for one, other in zip(before, written, strict=True))


@pytest.mark.parametrize("face", ["torch"], indirect=True)
def test_one_master_is_whole_at_a_time(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def join(weight: Tensor, remainder: Tensor) -> Tensor:
        assert not any(master() is not None for master in made)
        master = join_master(weight, remainder)
        made.append(weakref.ref(master))
        return master

    monkeypatch.setattr(kernels.adamw, "join_master", join)
    masters, grads, first, second = state()
    params, remainders = halves_of(masters)
    del masters
    adamw(params, grads, first, second, remainders=remainders, **OPTIONS, **scalars())
    assert len(made) == len(SHAPES)


@every_face
def test_halves_that_are_none_are_refused(face: str) -> None:
    masters, grads, *moments = state()
    params, remainders = halves_of(masters)

    def refused(why: str, params: list[Tensor] = params, **given: Any) -> None:
        before = copies(params, *moments, remainders)
        with pytest.raises(ValueError, match=why):
            adamw(params, grads, *moments, **{"remainders": remainders, **OPTIONS, **scalars(), **given})
        written = params, *moments, remainders
        assert all(same_bits(one, other) for one, other in zip(before, written, strict=True))

    refused("neither shadows nor", shadows=shadows_of(params))
    refused("neither shadows nor", rounding_seed=1)
    refused("3 remainders", remainders=remainders[:3])
    refused("tensor 1: shapes", remainders=[remainders[0], *remainders[:7]])
    refused("params bf16", params=masters)
    refused("params bf16", params=[x.half() for x in params])
    refused("remainders int16", remainders=[x.int() for x in remainders])
    refused("contiguous", remainders=[x.t().contiguous().t() if x.ndim == 2 else x for x in remainders])
