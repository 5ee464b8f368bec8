"""Steps on tensors without values: whoever asks the device for a number, or makes it wait for the host, is found.

On PyTorch's meta device tensors have shapes and no values, so what reads one fails by itself: `item`, `bool`,
`nonzero`, an index of booleans, a copy to the host. Copies *to* a device are seen here: on a GPU the host waits for
them, and for all that is queued before, unless their source is pinned and they are told not to block. Kernels are not
started, and everything around them is done, in their Triton face.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

import kernels.adamw_kernel
import kernels.grad_norm
from engine.guard import Guard, GuardConfig
from engine.mesh import ParallelConfig, Runtime
from engine.optim import AdamW, OptimConfig
from engine.recompute import Recompute
from engine.shard import Precision, parallelize
from engine.step import Objective, train_step
from kernels.backend import Chip, observed_launches

DEVICE = torch.device("meta")
NOWHERE = Runtime(0, 1, DEVICE, SimpleNamespace(ndim=1))  # type: ignore[arg-type]
_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)


class HostWaits(AssertionError):
    """What would make the host wait for a GPU."""


class Watch(TorchFunctionMode):
    """Refuses what would copy from the host to the device and make the host wait.

    pinned: numbers of the memory that counts as pinned.
    """

    def __init__(self, pinned: set[int]) -> None:
        super().__init__()
        self._pinned = pinned

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            # A mode is off while it answers, and what the backward pass calls would go by unseen.
            (loss,) = args
            with self:
                one = (torch.ones_like(loss),)
                return _engine_run_backward(
                    (loss,), one, False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        result = func(*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == DEVICE:
            self._look_at_index(func, *args[1:])
        elif _is_on_device(result):
            sources = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.device.type == "cpu"]
            if func in _MAKERS:
                raise HostWaits(f"{func.__name__} copies from the host")
            for source in sources:
                self._look_at_copy(func, source, args, kwargs)
        return result

    def _look_at_index(self, func: Any, index: Any, *value: Any) -> None:
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, (list, np.ndarray)) or (isinstance(part, Tensor) and part.device != DEVICE):
                raise HostWaits(f"{func.__name__} copies an index from the host")
        if value and not _is_on_device(value[0]):
            raise HostWaits("a number of the host is assigned; fill_ would hand it to a kernel")

    def _look_at_copy(self, func: Any, source: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if func not in (Tensor.to, Tensor.copy_):
            if source.ndim:  # one number is an argument of the kernel
                raise HostWaits(f"{func.__name__} reads a tensor of the host")
        elif not kwargs.get("non_blocking") or source.data_ptr() not in self._pinned:
            raise HostWaits(f"{func.__name__} copies from memory that is not pinned, or blocks")


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == DEVICE


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Watch]]:
    """Ops take their Triton faces without starting kernels; what is pinned is remembered. Gives what makes a watch."""
    pinned: set[int] = set()
    kept: list[Tensor] = []  # so that no other tensor gets the address

    def pin(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        pinned.add(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    # Pinned on a GPU, by a branch for it.
    for module in (kernels.adamw_kernel, kernels.grad_norm):
        monkeypatch.setattr(module, "address_table", lambda lists, device: torch.empty(len(lists), device=device))
    with observed_launches(lambda *_: None, Chip(90, 132)):
        yield lambda: Watch(pinned)


def make(
    root: type[nn.Module], config: Any, recompute: Recompute = "none", precision: Precision = "bf16"
) -> tuple[nn.Module, AdamW, Guard]:
    """A model without values, and what trains it."""
    with torch.device("meta"):
        model = root(config)
    parallelize(model, NOWHERE, ParallelConfig(), precision, recompute)
    return model, AdamW(model, OptimConfig(z_loss=1e-4)), Guard(GuardConfig(), DEVICE)


def step(trained: tuple[nn.Module, AdamW, Guard], objective: Objective, batches: Sequence[Any]) -> None:
    train_step(*trained, objective, batches, NOWHERE, lr=1e-3, wants_stop=True, busy_seconds=0.5)


def pinned(batch: Any) -> Any:
    """A dataclass of tensors, as a loader makes it."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    moved = {name: x.pin_memory() for name, x in values.items() if isinstance(x, Tensor)}
    nested = {name: pinned(x) for name, x in values.items() if dataclasses.is_dataclass(x)}
    return dataclasses.replace(batch, **moved, **nested)
