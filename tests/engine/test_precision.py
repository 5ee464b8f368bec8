"""What bf16 training keeps in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from engine.mesh import ParallelConfig, Runtime
from engine.shard import parallelize
from model.batch import PackedBatch
from model.config import PRESETS
from model.heads import CausalLM
from model.rope import Rotation


@pytest.fixture
def one_process() -> Iterator[Runtime]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Runtime(0, 1, torch.device("cpu"), init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)))
    dist.destroy_process_group()


def test_blocks_compute_in_bf16_with_rotary_tables_in_fp32(one_process: Runtime) -> None:
    with torch.device("meta"):
        model = CausalLM(PRESETS["tiny"])
    parallelize(model, one_process, ParallelConfig(), "bf16", "none")
    seen: list[tuple[torch.dtype, ...]] = []

    def look(hidden: torch.Tensor, rotation: Rotation, *_: object) -> torch.Tensor:
        seen.append((hidden.dtype, rotation.cos.dtype, rotation.sin.dtype))
        return hidden.clone()

    model.model.layers[1].forward = look
    row = torch.zeros(8, dtype=torch.int64)
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    model(PackedBatch(row, torch.arange(8), bounds, row, 1, 8), cross_entropy=True)
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)]
