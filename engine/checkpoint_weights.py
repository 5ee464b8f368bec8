"""The weights in a run's training state, for who wants another model of the run than the one it has published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engine.checkpoint import Checkpointer
from engine.manifest import SHARDS, DamagedFile, check_manifest, read_header, stored_tensors
from model.config import ModelConfig, parameter_shapes
from model.directories import is_adapter
from model.errors import InputError
from model.hf import read_adapted
from model.peft import open_adapter, trained_shapes


def read_checkpoint(run: Path, step: int, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights in a run's training state, as `model.hf.read_model` gives those of a model directory: full tensors,
    one at a time, whatever number of ranks wrote them; of a run with an adapter, merged with what it stands on.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    checkpointer = Checkpointer(run)
    if step not in checkpointer.steps():
        there = ", ".join(map(str, checkpointer.steps())) or "none"
        raise InputError(f"{run} has no checkpoint of step {step}. Choose one of those it has: {there}.")
    directory = checkpointer.directory(step)
    try:
        check_manifest(directory)
        stored = stored_tensors(directory)
    except DamagedFile as error:
        raise InputError(f"{error}. Choose another step.") from None
    adapter = open_adapter(run) if is_adapter(run) else None
    trained = parameter_shapes(config) if adapter is None else trained_shapes(config, adapter.spec)
    shapes = {f"model.{name}": shape for name, shape in trained.items()}
    if any(name not in stored or stored[name].shape != shape for name, shape in shapes.items()):
        raise InputError(f"{directory}: this checkpoint is of another model than the one in {run}. Choose another run.")
    pieces: dict[str, list[tuple[Path, list[int]]]] = {}
    for shard in sorted(directory.glob(SHARDS)):
        placement = json.loads(read_header(shard)[0]["__metadata__"]["DCP_SHARDING_INFO"])
        for name, place in placement.items():
            pieces.setdefault(name, []).append((shard, place["saved_offsets"]))

    def read(name: str) -> Tensor:
        full = torch.empty(trained[name])
        for shard, offsets in pieces[f"model.{name}"]:
            with safe_open(shard, framework="pt") as file:
                piece = file.get_tensor(f"model.{name}")
            full[tuple(slice(at, at + size) for at, size in zip(offsets, piece.shape, strict=True))] = piece
        return full

    return ((name, read(name)) for name in trained) if adapter is None else read_adapted(run, config, read)
