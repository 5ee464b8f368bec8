"""What FSDP gathers at once, and reduces the gradients of: a block, the root, and a head of one number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from engine.memory_setup import Setup
from model.config import ModelConfig, parameter_shapes
from model.lora import is_trained, lora_shapes

Shapes = dict[str, tuple[int, ...]]
# The parameters of a block; all blocks are alike.
_BLOCK = "model.layers.0."


@dataclass(frozen=True)
class Unit:
    """Some parameters, in numbers of entries.

    size: as they are.
    padded: with every rank's rows padded to rank 0's.
    last: of the last parameter.
    """

    size: int
    padded: int
    last: int


def unit_of(shapes: Iterable[tuple[int, ...]], setup: Setup) -> Unit:
    """The unit that parameters of these shapes make."""
    shapes = list(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    padded = [math.ceil(rows / setup.shards) * setup.shards * math.prod(rest) for rows, *rest in shapes]
    return Unit(sum(sizes), sum(padded), sizes[-1] if sizes else 0)


def all_shapes(config: ModelConfig, setup: Setup) -> Shapes:
    """Name and shape of every parameter, adapters among them."""
    shapes = parameter_shapes(config)
    return shapes if setup.lora is None else shapes | lora_shapes(config, setup.lora)


def trained_shapes(shapes: Shapes, setup: Setup) -> Shapes:
    """Those of the parameters that are trained."""
    return {name: shape for name, shape in shapes.items() if setup.lora is None or is_trained(name, setup.lora)}


def block_unit(shapes: Shapes, setup: Setup) -> Unit:
    """One block."""
    return unit_of((shape for name, shape in shapes.items() if name.startswith(_BLOCK)), setup)


def root_unit(shapes: Shapes, setup: Setup) -> Unit:
    """Embedding, final norm and the head of words."""
    return unit_of((shape for name, shape in shapes.items() if not name.startswith(("model.layers.", "score."))), setup)


def score_unit(shapes: Shapes, setup: Setup) -> Unit:
    """The head of one number, where there is one."""
    return unit_of((shape for name, shape in shapes.items() if name.startswith("score.")), setup)
