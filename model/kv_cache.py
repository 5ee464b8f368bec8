"""Keys and values of the tokens of running sequences, in pages.

A sequence holds as many pages of PAGE tokens as it has begun to fill, anywhere in one pool, and a table says which
(Kwon et al. 2023). Pages and not one slot of the longest length a sequence: a token of a 13B model takes 800 KB, so
64 slots of 4096 tokens would take 210 GB, while answers of 500 tokens fit in 26 GB of pages; and the full pages of a
prompt are shared by all of its samples.

PAGE = 64: a multiple of the blocks that `decode_attention` reads for heads of 64 and more, so a block lies in one
page; and on average half a page of every sequence is empty, 32 tokens. Page 0 belongs to nobody: the rows that fill
up a batch of fixed size write there.
"""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels.attention import attention, decode_attention
from kernels.attention.decode_pages import PagesInSight, decode_pages
from kernels.backend import cdiv, use_reference, use_triton
from model.batch import Layout
from model.config import ModelConfig
from model.errors import InputError

PAGE = 64
# Share of the memory that the cache takes at most where no budget is given: activations and graphs need the rest.
SHARE = {"cuda": 0.8, "cpu": 0.5}


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one page, all layers."""
    return 2 * config.num_layers * PAGE * config.num_kv_heads * config.head_dim * dtype.itemsize


def pages_for(tokens: int) -> int:
    return cdiv(tokens, PAGE)


class KVCache:
    """The memory.

    data: [L, 2, pages, K, PAGE, h]: keys and values of every layer. A head of a page is one stretch of memory.
    """

    def __init__(self, config: ModelConfig, pages: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = config.num_layers, 2, pages, config.num_kv_heads, PAGE, config.head_dim
        self.data = (
            torch.empty(shape, device=device, dtype=dtype) if device.type == "cuda" else _lazy_zeros(shape, dtype)
        )
        self._heads = torch.arange(config.num_kv_heads, device=device)

    def clear(self) -> None:
        """Forget what weights that are no more have left: NaN would spread where whole pages are multiplied."""
        if self.data.device.type == "cpu":
            self.data = _lazy_zeros(tuple(self.data.shape), self.data.dtype)

    def places(self, pages: Tensor, rows: Tensor) -> Tensor:
        """Where the heads of tokens go, int64 [T * K], from the tokens' pages and rows within them, int64 [T]."""
        heads = len(self._heads)
        return ((pages.unsqueeze(1) * heads + self._heads) * PAGE + rows.unsqueeze(1)).flatten()

    def write(self, layer: int, k: Tensor, v: Tensor, places: Tensor) -> None:
        """Keep k and v [T, K, h] at `places`."""
        for pages, new in zip(self.data[layer], (k, v), strict=True):
            pages.view(-1, new.shape[2]).index_copy_(0, places, new.reshape(-1, new.shape[2]))

    def paged(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values as `attention` takes them, [pages, PAGE, K, h] each."""
        return self.data[layer, 0].transpose(1, 2), self.data[layer, 1].transpose(1, 2)

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """int64 [n] each, on the device."""
        for layer in self.data:  # what is on its way takes memory: 20 GB for 400 whole pages of a 13B model
            layer[:, targets] = layer[:, sources]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written to: NumPy asks the system for them, torch would write them.

    Zeros, because on a CPU whole pages are multiplied (see `kernels.attention.decode_pages`).
    """
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True)
class Prefill:
    """A cache as seen by stretches of documents, any number of tokens each: `model.transformer.Cache`.

    places: where the new keys go, see `KVCache.places`.
    layout: bounds of the new tokens, and of all tokens of the same documents up to them.
    block_table: int32 [D, pages]; None if all documents begin here, and the new keys are all there are.
    """

    cache: KVCache
    places: Tensor
    layout: Layout
    block_table: Tensor | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        self.cache.write(layer, k, v, self.places)
        if self.block_table is not None:
            k, v = self.cache.paged(layer)
        layout = self.layout
        bounds = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_q, layout.max_k
        return attention(q, k, v, *bounds, window=window, block_table=self.block_table)


@dataclass(frozen=True)
class Decode:
    """A cache as seen by one new token a row: `model.transformer.Cache`.

    places: where the new keys go, see `KVCache.places`.
    lengths: int32 [B], keys of each row, the new one included.
    block_table: int32 [B, pages].
    """

    cache: KVCache
    places: Tensor
    lengths: Tensor
    block_table: Tensor
    sights: dict[int | None, PagesInSight] = field(default_factory=dict)  # by window, on a CPU

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        self.cache.write(layer, k, v, self.places)
        if q.is_cuda or use_triton(q) or use_reference():
            pages = self.cache.paged(layer)
            return decode_attention(q, *pages, self.lengths, window=window, block_table=self.block_table)
        if window not in self.sights:
            self.sights[window] = PagesInSight.of(self.lengths, self.block_table, PAGE, window)
        keys, values = self.cache.data[layer]
        return decode_pages(q, keys, values, self.sights[window])


class PagePool:
    """Which pages are free, and how many hold each of the others. No tensors."""

    def __init__(self, pages: int) -> None:
        self._free = list(range(1, pages))  # a heap: the lowest first, so that what is in use lies together
        self._holders = [0] * pages
        self._highest = 0  # no page above is held

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        self._highest = max([self._highest, *pages])
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each."""
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each; pages without any are free."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                heapq.heappush(self._free, page)

    def close_gaps(self) -> dict[int, int]:
        """Move held pages, the highest to the lowest free places, until they lie side by side. Returns the moves."""
        moves: dict[int, int] = {}
        while True:
            while self._highest > 0 and self._holders[self._highest] == 0:
                self._highest -= 1
            if not self._free or self._free[0] > self._highest:
                return moves
            source, target = self._highest, heapq.heappop(self._free)
            self._holders[target], self._holders[source] = self._holders[source], 0
            heapq.heappush(self._free, source)
            moves[source] = target


def count_pages(
    config: ModelConfig, context: int, max_rows: int, device: torch.device, dtype: torch.dtype, cache_bytes: int | None
) -> int:
    """How many pages a cache has: what the budget holds, but no more than max_rows sequences can fill.

    Raises:
        InputError: the budget does not hold one sequence of `context` tokens.
    """
    budget = int(SHARE[device.type] * free_memory(device)) if cache_bytes is None else cache_bytes
    size = page_bytes(config, dtype)
    pages = min(budget // size, 1 + max_rows * pages_for(context))
    if pages < 1 + pages_for(context):
        source = f"{SHARE[device.type]:.0%} of the memory" if cache_bytes is None else "cache_bytes"
        raise InputError(
            f"{source}, {budget} bytes, holds {max(0, pages - 1) * PAGE} tokens of this model, but the context is "
            f"{context}. Give at least {(1 + pages_for(context)) * size} bytes, or a shorter context."
        )
    return pages


def free_memory(device: torch.device) -> int:
    """Bytes a GPU has left, or all that the machine has: on a CPU, pages that are never written take no memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
