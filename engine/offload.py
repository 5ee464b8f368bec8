"""Device memory given back for a while: tensors wait in host memory and come back to the bit, as the same tensors.

What is emptied and filled again is their storage, so everybody who holds one of them (an optimizer, FSDP, a checkpoint)
goes on holding it. A 13B model's moments take 13 GB on each of eight GPUs, which travel in a quarter of a second each
way over PCIe 5, by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.shard import local

# Host memory is pinned in pieces: torch rounds each up to a power of two, so one large one might waste half of it.
_PIECE = 1 << 28


class Parking:
    """Where some tensors can wait. The host memory stays ours from the first time on: pinning it takes seconds.

    Args:
        tensors: gives them, sharded or not, all on one device; asked each time, as sharding may exchange storages.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._tensors = tensors
        self._pieces: list[Tensor] = []
        self._away: list[tuple[torch.UntypedStorage, int]] = []  # with their sizes

    @property
    def is_away(self) -> bool:
        return bool(self._away)

    @torch.no_grad()
    def leave(self) -> None:
        """To the host. Nobody may use the tensors then."""
        assert not self.is_away
        storages = {one.data_ptr(): one for one in (local(tensor).untyped_storage() for tensor in self._tensors())}
        away = [(storage, storage.nbytes()) for storage in storages.values() if storage.nbytes()]
        for on_host, on_device in self._pairs(away):
            on_host.copy_(on_device, non_blocking=True)
        for storage, _ in away:
            storage.resize_(0)
        self._away = away

    @torch.no_grad()
    def come_back(self) -> None:
        """To the device."""
        for storage, size in self._away:
            storage.resize_(size)
        for on_host, on_device in self._pairs(self._away):
            on_device.copy_(on_host, non_blocking=True)
        self._away = []

    @contextmanager
    def away(self) -> Iterator[None]:
        """The tensors are away within the block."""
        self.leave()
        try:
            yield
        finally:
            self.come_back()

    def _pairs(self, storages: list[tuple[torch.UntypedStorage, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes on the host, and those on the device that belong there."""
        total, position = sum(size for _, size in storages), 0
        while len(self._pieces) * _PIECE < total:
            size = min(_PIECE, total - len(self._pieces) * _PIECE)
            is_cuda = storages[0][0].device.type == "cuda"
            self._pieces.append(torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda))
        for storage, size in storages:
            content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
            begin = 0
            while begin < size:
                piece, at = divmod(position + begin, _PIECE)
                end = min(size, begin + _PIECE - at)
                yield self._pieces[piece][at : at + end - begin], content[begin:end]
                begin = end
            position += size
