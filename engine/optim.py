"""AdamW over (sharded) parameters: fp32 masters and moments, decoupled weight decay on matrices only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config import check_range
from engine.masters import Master, masters
from engine.shard import local
from kernels.adamw import adamw
from model.errors import InputError


@dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: float | None = None
    """peak learning rate; by default the job's: in pre-training from the model's width, in fine-tuning 1e-4"""
    beta1: float = 0.9
    """decay of the mean of gradients"""
    beta2: float = 0.95
    """decay of the mean of squared gradients"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """on matrices; norms and biases are never decayed"""
    clip: float = 1.0
    """largest global gradient norm; 0 turns clipping off"""
    z_loss: float = 0.0
    """weight of the squared log-sum-exp of the logits (PaLM uses 1e-4)"""

    def check(self) -> None:
        """Raises InputError where a value cannot train."""
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"--optim.lr is {self.lr}. Use a positive learning rate, such as 3e-4.")
        check_range("optim", self, 0, "beta1", "beta2", below=1)
        check_range("optim", self, 0, "eps", "weight_decay", "clip", "z_loss")


class AdamW:
    """Holds moments beside the parameters, sharded as they are; the update itself is `kernels.adamw`.

    Args:
        model: its parameters that require gradients are trained; matrices decay, the rest does not.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.exp_avg = {name: _zeros(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: _zeros(p) for name, p in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        # A tensor, so that a skipped step is not counted and nobody has to ask the device.
        self.updates = torch.zeros((), dtype=torch.float32, device=device)
        kept = dict(self.masters())
        assert all(one.dtype.itemsize >= 4 for one in kept.values()), "a 16-bit weight without its remainder"
        self._whole = [name for name, one in kept.items() if not isinstance(one, Master)]
        self._remainders = {name: one.remainder for name, one in kept.items() if isinstance(one, Master)}

    @torch.no_grad()
    def step(self, lr: Tensor, clip_scale: Tensor, should_skip: Tensor) -> None:
        """One update. All arguments are fp32 device scalars; gradients are multiplied by `clip_scale`.

        Where `should_skip` is not 0, parameters, moments and the count of updates stay as they are.
        """
        self.updates += 1 - should_skip
        # Masters are whole or in halves, and of a model of words all are alike: one launch.
        for names, remainders in ((self._whole, None), (list(self._remainders), list(self._remainders.values()))):
            adamw(
                [local(self.parameters[name]) for name in names],
                [local(self.gradient(name)) for name in names],
                [local(self.exp_avg[name]) for name in names],
                [local(self.exp_avg_sq[name]) for name in names],
                lr=lr,
                betas=(self.config.beta1, self.config.beta2),
                eps=self.config.eps,
                weight_decay=[self.config.weight_decay if self.parameters[name].ndim >= 2 else 0.0 for name in names],
                step=self.updates,
                clip_scale=clip_scale,
                should_skip=should_skip,
                remainders=remainders,
            )

    def gradient(self, name: str) -> Tensor:
        """The accumulated gradient of a parameter; a parameter without one is a mistake of ours."""
        gradient = self.parameters[name].grad
        assert gradient is not None, f"{name} took no part in the forward pass"
        return gradient

    @torch.no_grad()
    def local_gradients(self) -> list[Tensor]:
        """This rank's part of every gradient."""
        return [local(self.gradient(name)) for name in self.parameters]

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def masters(self) -> Iterator[tuple[str, Tensor | Master]]:
        """The fp32 masters of what is trained."""
        return masters(self.parameters.items())

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Everything a checkpoint must hold, as named tensors that loading fills in place."""
        yield "optimizer.updates", self.updates
        for name in self.parameters:
            yield f"optimizer.exp_avg.{name}", self.exp_avg[name]
            yield f"optimizer.exp_avg_sq.{name}", self.exp_avg_sq[name]


def _zeros(parameter: Tensor) -> Tensor:
    """In the dtype of its master, sharded as the parameter is."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=wide, requires_grad=False)
