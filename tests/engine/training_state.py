"""A small training state with every difficulty: uneven and empty shards, 0-d and integer tensors, bf16."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

SHARDED_BY = {"weight": 0, "embedding": 0, "fewer_rows_than_ranks": 0, "half": 0, "columns": 1, "empty": 0}
"""Dimension along which ranks split a tensor; the others are plain tensors, the same on every rank."""


def full_state(step: int) -> dict[str, Tensor]:
    """The state after `step` steps, in full: a function of the step alone."""
    random = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(7, 5, generator=random),
        "embedding": torch.randn(9, 4, generator=random),
        "fewer_rows_than_ranks": torch.randn(2, 3, generator=random),
        "half": torch.randn(6, generator=random).bfloat16(),
        "columns": torch.randn(3, 5, generator=random),
        "empty": torch.empty(0, 4),
        "order": torch.randint(2**62, (5,), generator=random),
        "count": torch.tensor(step),
        "scale": torch.randn((), generator=random),
    }


def trainer_state(step: int) -> dict:
    return {
        "step": step,
        "seed": 2**63,
        "loss": 0.1 * step,
        "sources": ["经典", "药典"],
        "best": None,
        "nested": {"a": 1},
    }


def mesh_of(replicas: int) -> DeviceMesh | None:
    """One group that shards (FSDP), or several that each do (HSDP); None without torch.distributed."""
    if not dist.is_initialized():
        return None
    world = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def sharded(state: dict[str, Tensor], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    if mesh is None:
        return state
    groups = [Replicate()] * (mesh.ndim - 1)
    return {
        name: distribute_tensor(tensor, mesh, [*groups, Shard(SHARDED_BY[name])]) if name in SHARDED_BY else tensor
        for name, tensor in state.items()
    }


def blank(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Somewhere to load into: the same layout, other values."""
    return sharded({name: torch.full_like(tensor, 77) for name, tensor in full_state(0).items()}, mesh)


def bits(tensor: Tensor) -> list[int]:
    """The bytes of a tensor, so that NaN equals itself and 0 differs from -0."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).tolist()


def differences(state: dict[str, Tensor], step: int) -> list[str]:
    """Names of the tensors that, gathered, are not bit for bit those of `full_state(step)`."""
    wrong = []
    for name, expected in full_state(step).items():
        found = state[name]
        found = found.full_tensor() if isinstance(found, DTensor) else found
        if (found.dtype, found.shape, bits(found)) != (expected.dtype, expected.shape, bits(expected)):
            wrong.append(name)
    return wrong
