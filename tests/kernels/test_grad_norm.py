"""The sum of squares of a list, against float64."""

from __future__ import annotations

import pytest
import torch

from kernels.grad_norm import grad_norm, grad_norm_reference
from kernels.tensor_list import CHUNK
from tests.kernels.faces import DEVICE, each_face, faces
from tests.kernels.oracle import random

SHAPES = [(5, 7), (1023,), (1,), (0, 4), (1024,), (25, 41), (), (2 * CHUNK + 17,)]


def assert_exact(ours: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Squares are exact in float64 and of one sign, so a sum of n of them errs by n roundings at most."""
    true = sum(x.double().square().sum() for x in tensors)
    count = sum(x.numel() for x in tensors)
    assert ours.dtype == torch.float64 and ours.shape == () and ours.device == tensors[0].device
    assert abs(ours - true) <= count * torch.finfo(torch.float64).eps * true


@faces
def test_grad_norm_is_the_sum_of_squares(face: str, dtype: torch.dtype) -> None:
    tensors = [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    assert_exact(grad_norm(tensors), tensors)
    assert_exact(grad_norm_reference(tensors), tensors)


@each_face
def test_tensors_of_several_dtypes_and_layouts_count_alike(face: str) -> None:
    tensors = [random(33, 7).t(), random(50, seed=1).bfloat16(), random(9, seed=2).half(), random(70, seed=3)[::3]]
    assert_exact(grad_norm(tensors), tensors)


@each_face
def test_squares_beyond_fp32_count(face: str) -> None:
    tensors = [torch.tensor([3e38, 1.0], device=DEVICE), torch.tensor([1e-40, 2e-25], device=DEVICE)]
    assert_exact(grad_norm(tensors), tensors)
    assert_exact(grad_norm(tensors[1:]), tensors[1:])


@each_face
def test_values_that_are_not_finite_are_seen(face: str) -> None:
    ones = torch.ones(CHUNK + 3, device=DEVICE)
    for place in (0, CHUNK - 1, CHUNK + 2):
        bad = ones.clone()
        bad[place] = float("inf")
        assert grad_norm([ones, bad]).isposinf()
        bad[place] = float("nan")
        assert grad_norm([bad, ones]).isnan()


@each_face
def test_a_tensor_that_is_not_aligned_changes_no_bit(face: str) -> None:
    x = random(CHUNK + 1001)
    moved = torch.empty(x.numel() + 1, device=DEVICE)[1:].copy_(x)
    assert moved.data_ptr() % 16 and grad_norm([moved]) == grad_norm([x]) == grad_norm([x])


@each_face
def test_empty_tensors_count_nothing(face: str) -> None:
    assert grad_norm([torch.empty(0, device=DEVICE), torch.empty(3, 0, device=DEVICE)]) == 0


def test_grad_norm_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        grad_norm([])
