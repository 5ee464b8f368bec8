"""What bf16 training keeps in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from engine.mesh import ParallelConfig, Runtime
from engine.shard import fill, local, parallelize
from model.batch import PackedBatch
from model.config import PRESETS, parameter_shapes
from model.heads import CausalLM, ScalarModel
from model.init import initial_value
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


def test_a_reward_head_computes_with_its_fp32_master(one_process: Runtime) -> None:
    """Not with a bf16 copy, and on hidden states that were bf16 already: nothing is rounded behind the trunk."""
    config = dataclasses.replace(PRESETS["tiny"], num_layers=1, vocab_size=64, head="score")
    with torch.device("meta"):
        model = ScalarModel(config)
    parallelize(model, one_process, ParallelConfig(), "bf16", "none")
    fill(model, ((name, initial_value(config, name, shape, 0)) for name, shape in parameter_shapes(config).items()))
    master = local(model.score.weight).detach().clone()
    assert master.dtype == torch.float32 and not torch.equal(master, master.bfloat16().float())
    hidden: list[torch.Tensor] = []
    model.model.register_forward_hook(lambda *args: hidden.append(args[2]))
    row = torch.arange(8)
    score = model(PackedBatch(row, row, torch.tensor([0, 8], dtype=torch.int32), row, 1, 8))
    assert score.dtype == torch.float32 and hidden[0].dtype == torch.bfloat16
    exact = hidden[0].double() @ master[0].double()
    assert (score - exact).abs().max() < 1e-6
    assert (exact - hidden[0].double() @ master[0].bfloat16().double()).abs().max() > 1e-4
    score.sum().backward()
    gradient = local(model.score.weight.grad)
    assert gradient.dtype == torch.float32
    assert (gradient[0] - hidden[0].double().sum(0)).abs().max() < 1e-5
