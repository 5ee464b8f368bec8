"""8-bit products in the blocks of a model: who may have them, and how a model is told.

The linear layers of blocks multiply in 8 bits (`kernels.fp8_linear`); embedding, norms, attention and the head stay as
they are. Parameters, gradients, optimizer and checkpoints know nothing of it, so a run may go on with it or without.
"""

from __future__ import annotations

import torch
from torch import nn

from kernels.fp8_cast import ALIGNMENT
from kernels.fp8_linear import has_fp8
from model.config import ModelConfig, parameter_shapes
from model.errors import InputError
from model.layers import Linear


def check_fp8(model: ModelConfig) -> None:
    """Raises InputError where a product of the blocks has a size that 8-bit products do not take."""
    for name, shape in parameter_shapes(model).items():
        if name.endswith("_proj.weight") and any(size % ALIGNMENT for size in shape):
            raise InputError(
                f"--train.fp8: {name} is {' x '.join(map(str, shape))}, and 8-bit products need multiples of "
                f"{ALIGNMENT}. Leave the option out."
            )


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Make the blocks' linear layers multiply in 8 bits, in training and in evaluation.

    Args:
        model: a root whose `.model.layers` are the blocks.
    Raises:
        InputError: the device cannot.
    """
    if not has_fp8(device):
        raise InputError(
            f"--train.fp8: {torch.cuda.get_device_name(device)} has no 8-bit products; an H100 has. "
            "Leave the option out."
        )
    for module in model.model.layers.modules():  # type: ignore[union-attr, operator]
        if isinstance(module, Linear):
            module.is_fp8 = True
