"""Processes and devices: who am I, what do I compute on, and with whom."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engine.config import check_range
from model.errors import InputError


@dataclass
class ParallelConfig:
    """How the model is spread over processes."""

    replicas: int = 1
    """groups that each hold a whole sharded model (HSDP); 1 shards over all processes (FSDP)"""
    reshard_after_forward: bool = True
    """free a block's gathered weights after each pass; false trades memory for one gather a step"""
    timeout_minutes: float = 15.0
    """a step, a save or a publication that takes longer ends the run with the stacks of all ranks"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("parallel", self, 1, "replicas")
        check_range("parallel", self, 0.1, "timeout_minutes")


@dataclass(frozen=True)
class Runtime:
    """This process's place among the others.

    mesh: one dimension ("shard",) or two ("replicate", "shard"); every rank sees its own data.
    patient_group: control traffic that may wait for days, as while rank 0 prepares a corpus.
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    patient_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Ranks that share a copy of the model."""
        return self.mesh.size(self.mesh.ndim - 1)

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({socket.gethostname()}, {self.device})"

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block, however long it takes; then the others, who find its work done."""
        if not self.is_main:
            self.wait_for_all()
        yield
        if self.is_main:
            self.wait_for_all()

    def wait_for_all(self) -> None:
        """Return when every rank has come here, however long that takes."""
        dist.barrier(self.patient_group)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


def start(config: ParallelConfig) -> Runtime:
    """Join the process group that torchrun's variables describe, or form one of a single process.

    Uses nccl for CUDA tensors and gloo for CPU tensors, so that control traffic never needs a GPU.
    Raises:
        InputError: `replicas` does not divide the world, or a node has more processes than GPUs.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world % config.replicas:
        raise InputError(
            f"--parallel.replicas {config.replicas} does not divide {world} processes. Use a divisor of {world}."
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}. "
                f"Start torchrun with --nproc-per-node {torch.cuda.device_count()}."
            )
        device = torch.device("cuda", local_rank)
        _let_segments_grow()
        torch.cuda.set_device(device)
    _make_deterministic()
    # Longer than the watchdog's patience, so that it speaks first: it knows the stacks.
    timeout = timedelta(minutes=2 * config.timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    shape: tuple[int, ...] = (world,)
    names: tuple[str, ...] = ("shard",)
    if config.replicas > 1:
        shape, names = (config.replicas, world // config.replicas), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    # A rank that went on to find a mistake and leave would take the store along that others are still joining through.
    dist.barrier(patient_group)
    return Runtime(rank, world, device, mesh, patient_group)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _let_segments_grow() -> None:
    """Blocks of changing sizes leave fewer gaps in the allocator's memory. Read at the first allocation."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _make_deterministic() -> None:
    """Same command, same world size: the same bits. Uninitialised memory need not be filled for that."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    # Where a product is split along its sum, the parts are added in fp32 too.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
