"""Initial values: a function of seed, name and shape."""

from __future__ import annotations

import math

import torch

from model.config import PRESETS, parameter_shapes
from model.init import initial_value

TINY = PRESETS["tiny"]


def test_values_depend_on_seed_and_name_and_nothing_else() -> None:
    name, shape = "model.layers.3.mlp.down_proj.weight", (256, 768)
    first = initial_value(TINY, name, shape, seed=1)
    torch.randn(100)  # the global generator has no part in it
    assert torch.equal(first, initial_value(TINY, name, shape, seed=1))
    assert not torch.equal(first, initial_value(TINY, name, shape, seed=2))
    assert not torch.equal(first, initial_value(TINY, name.replace("3", "4"), shape, seed=1))


def test_every_parameter_has_the_spread_of_its_kind() -> None:
    for name, shape in parameter_shapes(TINY).items():
        value = initial_value(TINY, name, shape, seed=0)
        assert value.dtype == torch.float32 and tuple(value.shape) == shape
        if "norm" in name:
            assert (value == 1).all(), name
            continue
        residual = "o_proj" in name or "down_proj" in name
        std = TINY.initializer_range / (math.sqrt(2 * TINY.num_layers) if residual else 1)
        # The sample's spread over n values errs by 1/sqrt(2n); five of those.
        assert abs(value.std() / std - 1) < 5 / math.sqrt(2 * value.numel()), name
        assert abs(value.mean() / std) < 5 / math.sqrt(value.numel()), name


def test_biases_start_at_zero() -> None:
    assert not initial_value(TINY, "model.layers.0.self_attn.qkv_proj.bias", (64,), seed=0).any()


def test_the_values_are_pinned() -> None:
    """An old run started again from its seed must find its old weights."""
    value = initial_value(PRESETS["7b"], "lm_head.weight", (3, 2), seed=7)
    pinned = torch.tensor([[-0.00631156, -0.04321157], [0.02815162, 0.02995920], [-0.02856334, -0.01313541]])
    assert torch.allclose(value, pinned, rtol=0, atol=1e-8)
