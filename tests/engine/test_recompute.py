"""Which results selective recomputation keeps."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

import kernels.attention  # noqa: F401  registers the ops
from engine.recompute import _COSTLY, _keep_the_costly


@pytest.mark.parametrize(
    "name",
    [
        "aten::mm",
        "chimed::attention",
        "chimed::matmul_nt",
        "aten::_scaled_dot_product_flash_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
    ],
)
def test_products_and_attention_by_any_provider_are_kept(name: str) -> None:
    assert _COSTLY.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "aten::mul",
        "chimed::rms_norm",
        "chimed::attention_bwd",
        "aten::_scaled_dot_product_flash_attention_backward",
        "flash_attn::_flash_attn_varlen_backward",
        "flash_attn_3::bwd",
    ],
)
def test_what_streams_memory_or_belongs_to_the_backward_is_not(name: str) -> None:
    assert not _COSTLY.fullmatch(name)


def test_an_op_is_known_by_its_name() -> None:
    assert _keep_the_costly(None, torch.ops.chimed.attention.default) == CheckpointPolicy.MUST_SAVE
    assert _keep_the_costly(None, torch.ops.aten.mul.Tensor) == CheckpointPolicy.PREFER_RECOMPUTE
