"""Count the bytes of all tensors alive, op by op: real tensors, fake ones, or tensors on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, follows the storage of every tensor that an op returns. Storages are counted once.

    Attributes:
        log: (name of the op, bytes alive right after it), in order.
        makers: name of the op that made each storage, by its address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []
        self.makers: dict[int, str] = {}
        self._storages: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor, maker: str = "") -> None:
        """Follow a tensor that was made before, too."""
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known.expired():
            self._storages[storage._cdata] = StorageWeakRef(storage)
            self.makers[storage._cdata] = maker

    def alive(self) -> dict[int, int]:
        """Bytes of every storage alive now, by its address. FSDP empties storages without freeing them."""
        sizes = {}
        for key, reference in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._storages[key]
            else:
                sizes[key] = storage.nbytes()
        return sizes

    def total(self) -> int:
        """Bytes alive now."""
        return sum(self.alive().values())

    def peak(self) -> int:
        return max(total for _, total in self.log)

    def after(self, op: str) -> list[int]:
        """Bytes alive after each call of an op."""
        return [total for name, total in self.log if name == op]

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                self.add(leaf, str(op))
        self.log.append((str(op), self.total()))
        return result
