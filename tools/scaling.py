"""Say how a training step scales to several nodes: FSDP beside HSDP, by datasheets, without any GPU.

    python tools/scaling.py                                       # Ziya2-13B on 8 to 512 H100, InfiniBand
    python tools/scaling.py --network 100 --tokens_per_gpu 65536  # one 100 Gb/s card a node, more accumulation
    python tools/scaling.py --batch_tokens 4194304                # a fixed batch, spread over ever more GPUs
    python tools/scaling.py --longest                             # how long a document may be

What is printed is a model, not a measurement: docs/scaling.md says what it holds to and where it ends.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.building import find_base
from engine.launch import run
from engine.memory import Setup
from engine.recompute import Recompute
from engine.scaling import GPUS_PER_NODE, Cluster
from engine.scaling_report import longest_packs, report
from model.errors import InputError


@dataclass
class ScalingConfig:
    """How a training step scales, FSDP beside HSDP."""

    model: str = "ziya2-13b"
    """a preset, or a model directory"""
    gpus: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256, 512])
    """numbers of GPUs to look at, whole nodes of 8"""
    gpu: Literal["A100", "H100", "H200"] = "H100"
    """what they are, with 80 GB of memory or, H200, 141"""
    network: float = 3200.0
    """Gb/s of all network cards of a node together, in each direction: 8 x 400 of a DGX H100, 8 x 200 of a DGX A100"""
    mfu: float = 0.5
    """share of the bf16 peak that is reached while nothing is waited for, attention counted as causal"""
    context: int = 4096
    """tokens of a document"""
    micro_batch_tokens: int = 8192
    """tokens of a forward pass"""
    tokens_per_gpu: int = 8192
    """tokens of an optimizer step on one GPU; more of them are several micro-batches"""
    batch_tokens: int | None = None
    """tokens of an optimizer step on all GPUs together, instead of --tokens_per_gpu"""
    recompute: Recompute = "selective"
    """as --train.recompute"""
    reshard_after_forward: bool = True
    """as --parallel.reshard_after_forward"""
    longest: bool = False
    """say instead how long a document may be, by recompute mode"""

    def check(self) -> None:
        """Raises InputError where numbers do not fit together."""
        for name, least in (("network", 1), ("context", 1), ("micro_batch_tokens", self.context)):
            value = getattr(self, name)
            if not value >= least:
                raise InputError(f"--{name} is {value}. Use {least:,} or more.")
        if not 0 < self.mfu <= 1:
            raise InputError(f"--mfu is {self.mfu}. Use a share above 0, up to 1.")
        wrong = [count for count in self.gpus if count < GPUS_PER_NODE or count % GPUS_PER_NODE]
        if wrong or not self.gpus:
            found = f"{wrong[0]}, no whole number of nodes" if wrong else "empty"
            raise InputError(f"--gpus is {found}. Use multiples of {GPUS_PER_NODE}.")
        for name in ("tokens_per_gpu", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value % self.micro_batch_tokens):
                raise InputError(
                    f"--{name} {value} is no whole number of micro-batches of {self.micro_batch_tokens} tokens. "
                    "Change it, or --micro_batch_tokens."
                )


def main(config: ScalingConfig) -> None:
    config.check()
    model = find_base(config.model).config.with_context(config.context)
    setup = Setup(
        tokens_per_pack=config.micro_batch_tokens,
        context=config.context,
        recompute=config.recompute,
        reshard_after_forward=config.reshard_after_forward,
        micro_batches=config.tokens_per_gpu // config.micro_batch_tokens,
    )
    cluster = Cluster(config.gpu, config.network / 8 * 1e9, config.mfu)
    print(f"{config.model}: {model.num_parameters:,} parameters. Modelled, not measured.")
    if config.longest:
        print(longest_packs(model, setup, config.gpus, cluster))
    else:
        print(report(model, setup, config.gpus, cluster, config.batch_tokens))


if __name__ == "__main__":
    run(main, ScalingConfig)
