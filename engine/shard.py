"""The one place where parallelism is applied: recompute, then compile, then shard.

Everything else is written as if for one device. Parameters are fp32 masters; under `bf16` each block's weights
are gathered in bf16 and its gradients reduced in fp32 (FSDP2's mixed precision). What is frozen needs no master and is
stored as it computes, in bf16. FSDP2 asks for one dtype of what is trained in a unit, not of what is frozen beside it,
and all of a unit is gathered in one dtype. The head of a reward or value model computes in fp32 always.

One process has nothing to gather and nothing to reduce, and FSDP2 would only copy. There masters are kept in halves,
and products read the upper one: `engine.masters`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.masters import Master, keep_in_halves, master
from engine.mesh import ParallelConfig, Runtime
from engine.recompute import Recompute, apply_recompute
from kernels.masters import split_master
from model.heads import ScalarModel

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Accumulation:
    """What a sharded model does between the micro-batches of a step.

    keeps_weights: what stays gathered after a forward pass stays so until the step's last backward pass.
    keeps_gradients: they are added up where they are, and reduced once.
    """

    keeps_weights: bool
    keeps_gradients: bool


def parallelize(
    model: nn.Module,
    runtime: Runtime,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: Recompute,
    compile_blocks: bool = False,
) -> None:
    """Prepare a model on the meta device for training, in place; `fill` then gives it its weights.

    Args:
        model: a root whose `.model.layers` are the blocks (CausalLM, ScalarModel). Parameters that require no
            gradient are frozen for good.
    """
    blocks = model.model.layers
    apply_recompute(blocks, recompute, compile_blocks)
    if compile_blocks:
        for block in blocks:
            # Not `block.compile()`: that would draw the hooks of sharding and timing into the graph.
            # One graph: a break would hide what is slow, and our kernels are ops that it can hold.
            block.forward = torch.compile(block.forward, fullgraph=True)
    is_alone = runtime.world == 1
    if precision == "bf16":
        _narrow(model, only_frozen=not is_alone)
    if not is_alone:
        # Inputs stay as they are: FSDP would round the rotary tables, temperatures and loss weights to bf16.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for block in blocks:
            fully_shard(
                block, mesh=runtime.mesh, mp_policy=policy, reshard_after_forward=parallel.reshard_after_forward
            )
        if isinstance(model, ScalarModel):
            full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(model.score, mesh=runtime.mesh, mp_policy=full, reshard_after_forward=False)
        # The root holds embedding, final norm and the head of words: used first and last, so gathered once a pass.
        fully_shard(model, mesh=runtime.mesh, mp_policy=policy, reshard_after_forward=False)
        model.accumulation = Accumulation(not parallel.reshard_after_forward, runtime.shards == 1)
    model.to_empty(device=runtime.device)
    if is_alone and precision == "bf16":
        keep_in_halves(model)


def _narrow(model: nn.Module, only_frozen: bool) -> None:
    """Parameters in bf16, but for the head of one number."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if path != "score" and not (only_frozen and parameter.requires_grad):
                setattr(module, name, nn.Parameter(parameter.bfloat16(), requires_grad=parameter.requires_grad))


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy full tensors, one at a time, into a model's (sharded) parameters. Every rank reads the same tensors.

    Args:
        tensors: (name, full tensor) for every parameter, any float dtype, any device.
    """
    parameters = dict(model.named_parameters())
    for name, full in tensors:
        target = master(parameters.pop(name))
        if isinstance(target, Master):
            target.copy_(full)
            continue
        if target.dtype == torch.bfloat16 != full.dtype and not isinstance(target, DTensor):
            # Rounded as a master's upper half is, so that a frozen copy of a model in training agrees with it; where it
            # lies, since that takes several times its memory.
            full, _ = split_master(full.float())
        full = full.to(device=target.device, dtype=target.dtype)
        if isinstance(target, DTensor):
            full = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(full)
    assert not parameters, f"parameters without a value: {sorted(parameters)}"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def set_last_micro_batch(model: nn.Module, is_last: bool) -> None:
    """Say of a backward pass whether it is the last one of a step.

    Gradients are reduced over replicas (HSDP) once a step, but scattered within a replica at every micro-batch: they
    stay sharded, and accumulation costs no memory. A replica of one rank has nothing to scatter. There they pass
    through FSDP's buffers once a step.
    """
    if isinstance(model, FSDPModule):
        does = model.accumulation
        assert isinstance(does, Accumulation)
        if does.keeps_gradients:
            model.set_requires_gradient_sync(is_last)
        else:
            model.set_requires_all_reduce(is_last)
        if does.keeps_weights:
            model.set_reshard_after_backward(is_last)
        model.set_is_last_backward(is_last)


def free_gathered(model: nn.Module) -> None:
    """Back to sharded masters after a forward without a backward, which would have left the root gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
