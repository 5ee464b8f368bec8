"""Lists of tensors that one launch walks over: where the tensors lie, and how they are cut into pieces.

An optimizer step touches hundreds of tensors, most of them too small to fill a GPU. One launch covers them all with
two tables in device memory. The chunk table, one row a program, depends on the sizes alone: it is made once and kept.
The address table, one row a list, holds where each tensor begins: gradients are allocated anew at every step, so it
is filled at every step, through pinned memory, and the host never waits.

A chunk is read in whole blocks of 16-byte accesses where all its tensors are aligned to that, and number by number
elsewhere: FSDP2's gradients are views into one flat buffer and may begin at any of its numbers. Which of the two it
is, the program sees from the addresses.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of one chunk: long enough that reading the tables (two dependent loads, about a microsecond) is lost beside
# streaming it, short enough that a few million numbers reach every multiprocessor.
CHUNK = 16384
NUM_WARPS = 4

TRITON_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

# Pinned memory that a captured graph copies from at every replay, so nobody else may ever have it.
_captured: list[Tensor] = []


@functools.lru_cache(maxsize=16)
def chunk_table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """How tensors are cut: int64 [chunks, 4], each row (tensor, start, length, place).

    A chunk is `length` numbers of a tensor, from its number `start` on; in the concatenation of all tensors they
    begin at `place`. Starts are multiples of CHUNK, so a chunk is aligned as its tensor is.

    Args:
        sizes: numbers in each tensor; empty tensors have no chunk.
    """
    size = torch.tensor(sizes, dtype=torch.int64)
    chunks = (size + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    start = CHUNK * (torch.arange(len(tensor)) - (chunks.cumsum(0) - chunks)[tensor])
    length = (size[tensor] - start).clamp(max=CHUNK)
    place = (size.cumsum(0) - size)[tensor] + start
    return torch.stack([tensor, start, length, place], dim=1).to(device)


def address_table(lists: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Where tensors begin: int64 [lists, tensors]. Lists are of one length, not 0, and their tensors contiguous.

    The table holds addresses and not the tensors: these must live until the launch is made.
    """
    addresses = array("q")
    for tensors in lists:
        addresses.extend(map(Tensor.data_ptr, tensors))
    host = torch.frombuffer(addresses, dtype=torch.int64).view(len(lists), -1)
    if device.type != "cuda":
        return host.to(device)
    host = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)


@triton.jit
def load_chunk(chunks_ptr):
    """(tensor, start, length, place) of this program's chunk; all int64 but the length."""
    row_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * 4
    return tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2).to(tl.int32), tl.load(row_ptr + 3)


@triton.jit
def address(addresses_ptr, row, tensors, tensor, start, dtype: tl.constexpr):
    """Where a chunk begins in memory. An integer: what `block_ptr` promises of a pointer must not reach others."""
    itemsize: tl.constexpr = dtype.primitive_bitwidth // 8
    return tl.load(addresses_ptr + row * tensors + tensor) + start * itemsize


@triton.jit
def block_ptr(address, position, dtype: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to the block at a position of a chunk, known to be aligned to VECTOR numbers."""
    start_ptr = address.to(tl.pointer_type(dtype))
    start_ptr = tl.multiple_of(start_ptr, VECTOR * dtype.primitive_bitwidth // 8)
    return start_ptr + position + tl.arange(0, BLOCK)
