"""Who computes what, in which order: tiles of ragged documents, the longest first.

Attention is cut into tiles of BLOCK queries (or keys) that begin at the start of a document, so that what is computed
for a document does not depend on what it is packed with. Only the device knows how many tiles there are and how much
work each is, and it does not tell the host: a small kernel turns the bounds of the documents into a list of tiles,
in order of falling work. Programs take tiles from the front of the list, and the short ones fill the gaps at the end.

The place of a tile in the list has a closed form. Number a document's tiles by falling work, r = 0, 1, ... Then

    work(r) = min(ceiling, top - r BLOCK)

    tiles of queries, the last first:  work = keys seen by the tile's last query,   ceiling = min(n_k, reach)
    tiles of keys, the first first:    work = queries from its first key on,        ceiling = min(n_q, reach)

where reach is what a sliding window lets a tile see (at the edges of a document it may see less). Of another
document (top - w) / BLOCK tiles, rounded up, have more work than w, or none if its ceiling is no more than w; a
tile's place is the sum of that over all documents, and equal work goes by the order of documents. So every tile finds
its place by itself: no sorting, no atomics, one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import cdiv, launch

# A row of the list: document, tile within it, start and number of the document's queries, and of its keys.
# Row 0 is the header: the number of tiles in the rows after it.
FIELDS = 6
# Bytes of what a section's programs read again and again; a section should stay in L2 (40 MB on A100, 50 on H100).
SECTION_BYTES = 32 * 2**20
# Tiles that a program of the schedule places, and documents that it looks at in one step: a few, or many.
TILES, FEW, MANY = 8, 64, 1024
_NO_LIMIT = 2**31 - 1


@triton.jit
def _extent(cu_q_ptr, cu_k_ptr, document, documents, reach, OVER_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Bounds of documents and what their tiles' work follows from; documents past the last have no tiles."""
    is_document = document < documents
    start_q = tl.load(cu_q_ptr + document, mask=is_document, other=0)
    start_k = tl.load(cu_k_ptr + document, mask=is_document, other=0)
    n_q = tl.load(cu_q_ptr + document + 1, mask=is_document, other=0) - start_q
    n_k = tl.load(cu_k_ptr + document + 1, mask=is_document, other=0) - start_k
    if OVER_KEYS:
        tiles = tl.cdiv(n_k, BLOCK)
        top = n_k
        ceiling = tl.minimum(n_q, reach)
    else:
        tiles = tl.cdiv(n_q, BLOCK)
        top = n_k - n_q + tiles * BLOCK
        ceiling = tl.minimum(n_k, reach)
    return start_q, n_q, start_k, n_k, tiles, top, ceiling


@triton.jit(do_not_specialize=["documents"])
def _schedule_kernel(
    cu_q_ptr,
    cu_k_ptr,
    list_ptr,
    documents,
    reach,
    OVER_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    TILES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    # Tiles are handed to programs document by document: find the document of each of ours.
    number = tl.program_id(0) * TILES + tl.arange(0, TILES)  # fits 32 bits: a tile
    document = tl.zeros((TILES,), tl.int32)
    first = tl.zeros((TILES,), tl.int32)  # number of the document's first tile
    count = tl.program_id(0) * 0
    for begin in range(0, documents, DOCUMENTS):
        other = begin + tl.arange(0, DOCUMENTS)
        _, _, _, _, tiles, _, _ = _extent(cu_q_ptr, cu_k_ptr, other, documents, reach, OVER_KEYS, BLOCK)
        end = count + tl.cumsum(tiles, axis=0)  # fits 32 bits: tiles
        is_before = end[None, :] <= number[:, None]
        document += tl.sum(is_before.to(tl.int32), axis=1)
        first = tl.maximum(first, tl.max(tl.where(is_before, end[None, :], 0), axis=1))
        count += tl.sum(tiles, axis=0)  # fits 32 bits: tiles
    if tl.program_id(0) == 0:
        tl.store(list_ptr, count)

    if tl.program_id(0) * TILES < count:
        start_q, n_q, start_k, n_k, tiles, top, ceiling = _extent(
            cu_q_ptr, cu_k_ptr, document, documents, reach, OVER_KEYS, BLOCK
        )
        r = number - first
        work = tl.minimum(ceiling, top - r * BLOCK)  # fits 32 bits: keys or queries of a document
        place = r
        for begin in range(0, documents, DOCUMENTS):
            other = begin + tl.arange(0, DOCUMENTS)
            _, _, _, _, their_tiles, their_top, their_ceiling = _extent(
                cu_q_ptr, cu_k_ptr, other, documents, reach, OVER_KEYS, BLOCK
            )
            # More work than `bar` goes before us: of documents before ours, as much work too.
            bar = work[:, None] - (other[None, :] < document[:, None]).to(tl.int32)
            ahead = tl.minimum(tl.cdiv(tl.maximum(their_top[None, :] - bar, 0), BLOCK), their_tiles[None, :])
            ahead = tl.where((their_ceiling[None, :] > bar) & (other[None, :] != document[:, None]), ahead, 0)
            place += tl.sum(ahead, axis=1)  # fits 32 bits: a place in the list
        tile = r if OVER_KEYS else tiles - 1 - r
        row_ptr = list_ptr + (1 + place).to(tl.int64) * FIELDS
        is_tile = number < count
        tl.store(row_ptr, document, mask=is_tile)
        tl.store(row_ptr + 1, tile, mask=is_tile)
        tl.store(row_ptr + 2, start_q, mask=is_tile)
        tl.store(row_ptr + 3, n_q, mask=is_tile)
        tl.store(row_ptr + 4, start_k, mask=is_tile)
        tl.store(row_ptr + 5, n_k, mask=is_tile)


@triton.jit
def take(list_ptr, item, kv_heads, section, GROUPS: tl.constexpr, FIELDS: tl.constexpr):
    """The item-th piece of work, of as many as there are tiles times kv_heads * GROUPS: a head and a tile.

    Key-value heads go by sections whose data fits in L2, within a section the longest tiles go first, and the GROUPS
    heads that share keys stand side by side.

    Returns: head (of kv_heads * GROUPS), document, tile, start_q, n_q, start_k, n_k.
    """
    count = tl.load(list_ptr)  # again, rather than a register held from tile to tile
    skipped = item // (count * section * GROUPS) * section  # fits 32 bits: key-value heads in earlier sections
    heads = tl.minimum(section, kv_heads - skipped) * GROUPS  # fits 32 bits: heads of this one
    item -= count * skipped * GROUPS  # fits 32 bits: tiles times heads
    row_ptr = list_ptr + (1 + item // heads).to(tl.int64) * FIELDS
    head = skipped * GROUPS + item % heads  # fits 32 bits: a head
    document, tile = tl.load(row_ptr), tl.load(row_ptr + 1)
    start_q, n_q = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    start_k, n_k = tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    return head, document, tile, start_q, n_q, start_k, n_k


def make_schedule(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows: int, block: int, window: int | None, *, over_keys: bool
) -> Tensor:
    """List of all tiles in order of falling work, made on the device.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [D+1].
        rows: of queries, or of keys with `over_keys`: what is cut into tiles of `block`.
    Returns:
        int32 [1 + most tiles there can be, FIELDS]; the first number is how many there are. Rows past those are
        not written.
    """
    documents = cu_seqlens_q.shape[0] - 1
    most = min(rows // block + documents, rows)  # a document adds at most one tile that is not full
    tiles = cu_seqlens_q.new_empty((1 + most, FIELDS))
    reach = _NO_LIMIT if window is None else window + block - 1
    launch(
        _schedule_kernel,
        (cdiv(most, TILES),),
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        tiles,
        documents,
        reach,
        OVER_KEYS=over_keys,
        BLOCK=block,
        FIELDS=FIELDS,
        TILES=TILES,
        DOCUMENTS=FEW if documents <= FEW else MANY,
        num_warps=4,
    )
    return tiles


def programs(documents: int, rows: int, block: int, longest: int) -> int:
    """Programs for a list of tiles, a head; where there are more tiles than that, programs take turns.

    The list has room for every document, but most documents of a batch are padding without tiles. Unless documents
    are shorter than a tile on average, twice as many tiles as would cover the rows is enough for all.
    """
    return min(rows // block + documents, 2 * cdiv(rows, block), documents * max(1, cdiv(longest, block)))


def section_of(kv_heads: int, head_bytes: int) -> int:
    """Key-value heads in a section, by the bytes that a head's programs share."""
    return max(1, min(kv_heads, SECTION_BYTES // max(1, head_bytes)))
