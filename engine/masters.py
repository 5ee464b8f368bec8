"""fp32 masters on one device: each trained parameter is bf16, what products read, and has a remainder beside it.

Together they are the master (`kernels.masters`), in 4 bytes; nothing is cast before a forward pass, and nothing
gathered. Gradients are added up in fp32, by the products that form them (`kernels.linear`). Checkpoints and published
models hold the master, so a run may go on with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.masters import join_master, split_master


@dataclass(frozen=True)
class Master:
    """An fp32 tensor in two halves.

    weight: bf16.
    remainder: int16, on the same device.
    """

    weight: Tensor
    remainder: Tensor
    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def element_size(self) -> int:
        """Bytes a number."""
        return self.dtype.itemsize

    def join(self) -> Tensor:
        """A new fp32 tensor."""
        return join_master(self.weight, self.remainder)

    def copy_(self, full: Tensor, at: tuple[slice, ...] = ()) -> None:
        """Take over an fp32 tensor, or a part of one."""
        weight, remainder = split_master(full.to(self.weight.device, self.dtype))
        self.weight[at].copy_(weight)
        self.remainder[at].copy_(remainder)

    def outline(self) -> Tensor:
        """A tensor of this shape and dtype, without memory: for plans, not for values."""
        return torch.empty((), dtype=self.dtype).expand(self.shape)


def keep_in_halves(model: nn.Module) -> None:
    """Give every trained bf16 parameter a remainder, still empty, and a gradient in fp32."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter._remainder = torch.empty_like(parameter, dtype=torch.int16, requires_grad=False)  # type: ignore[attr-defined]
            parameter.grad_dtype = torch.float32


def master(parameter: Tensor) -> Tensor | Master:
    """What a parameter is in full, without a graph: itself, or the master whose upper half it is."""
    remainder = getattr(parameter, "_remainder", None)
    return parameter.detach() if remainder is None else Master(parameter.detach(), remainder)


def masters(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor | Master]]:
    """Named parameters in full."""
    return ((name, master(parameter)) for name, parameter in parameters)
