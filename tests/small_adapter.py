"""An adapter with random values beside a model directory, for tests of whole jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.hf import load_config
from model.lora import LoraSpec
from model.peft import trained_shapes, write_adapter


def write_small_adapter(
    directory: Path, base: Path, spec: LoraSpec | None = None, config: ModelConfig | None = None
) -> Path:
    """Rank 2 on every projection, unless another spec is given; no tokenizer, as PEFT leaves it."""
    spec, config = spec or LoraSpec(2, 4.0), config or load_config(base)
    generator = torch.Generator().manual_seed(0)

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, shape in trained_shapes(config, spec).items():
            yield name, torch.randn(shape, generator=generator) * 0.2

    write_adapter(directory, config, spec, base, values())
    return directory
