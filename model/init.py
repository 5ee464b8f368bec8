"""Initial values of parameters: a function of seed, name and shape, so every world size starts alike."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from model.config import ModelConfig


def initial_value(
    config: ModelConfig, name: str, shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The full initial value of one parameter, fp32.

    Norm weights are 1, biases 0, matrices normal with standard deviation `initializer_range`; those that write
    to the residual stream (o_proj, down_proj) have it divided by sqrt(2 L), so that the stream's variance does
    not grow with depth (Radford et al. 2019, section 2.3). A reward head of width d has deviation 1 / sqrt(d + 1), so
    that first scores are near 1 in size (Stiennon et al. 2020, in its code). Of an adapter, A is uniform within
    1 / sqrt(in) (Kaiming's with a = sqrt(5), as peft draws it) and B is 0, so that it begins as nothing. The draw is
    made on the CPU, whatever the device, because generators differ between devices.
    """
    kind = name.rsplit(".", 2)[-2:]
    if kind[-1] == "lora_b":
        return torch.zeros(shape, device=device)
    if len(shape) == 1:
        return (torch.zeros if kind[-1] == "bias" else torch.ones)(shape, device=device)
    std = config.initializer_range
    if kind[0] in ("o_proj", "down_proj"):
        std /= math.sqrt(2 * config.num_layers)
    elif kind[0] == "score":
        std = 1 / math.sqrt(config.hidden_size + 1)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
    if kind[-1] == "lora_a":
        return torch.empty(shape).uniform_(-1, 1, generator=generator).div_(math.sqrt(shape[1])).to(device)
    return torch.randn(shape, generator=generator).mul_(std).to(device)
