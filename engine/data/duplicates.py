"""Exact duplicates by the hashes that preparation stored."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.files import locked, sync_file

# From here on the answer is kept in a file: below, finding it takes less than a second.
_CACHED_FROM = 2_000_000
_SCAN = 1 << 20  # hashes looked at in one go


class Hashes(Protocol):
    """Documents with hashes, as `corpus.Store`."""

    fingerprint: str

    def __len__(self) -> int: ...

    def hashes(self, first: int, last: int) -> np.ndarray: ...


def find_duplicates(store: Hashes, cache: Path) -> np.ndarray:
    """Documents whose text an earlier one has.

    Args:
        cache: directory that keeps the answer for large stores, where it can be written.
    Returns:
        int64, ascending.
    """
    if len(store) < _CACHED_FROM:
        return _find(store)
    path = cache / f"duplicates-{store.fingerprint}.npy"
    with _alone(path):
        with contextlib.suppress(OSError, ValueError):
            return np.load(path, mmap_mode="r")
        duplicates = _find(store)
        with contextlib.suppress(OSError):
            beside = path.with_name(f".{path.stem}.{os.getpid()}.npy")
            np.save(beside, duplicates)
            sync_file(beside)
            os.replace(beside, path)
        return duplicates


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, where the directory can be written: the others find the answer there."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(locked(path.with_suffix(".lock")))
        yield


def _find(store: Hashes) -> np.ndarray:
    """Sort half of each hash (8 bytes a document); compare whole hashes only where halves repeat."""
    count = len(store)
    halves = np.empty(count, np.uint64)
    for first in range(0, count, _SCAN):
        last = min(count, first + _SCAN)
        halves[first:last] = store.hashes(first, last)[:, 0]
    ordered = np.sort(halves)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(repeated):
        return np.empty(0, np.int64)
    candidates = np.concatenate(
        [first + _members(halves[first : first + _SCAN], repeated) for first in range(0, count, _SCAN)]
    )
    whole = _gather(store, candidates)
    order = np.lexsort((candidates, whole[:, 1], whole[:, 0]))
    is_repeat = (whole[order][1:] == whole[order][:-1]).all(axis=1)
    return np.sort(candidates[order][1:][is_repeat]).astype(np.int64)


def _members(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where in `values` something of the ascending `wanted` stands."""
    nearest = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
    return np.flatnonzero(wanted[nearest] == values)


def _gather(store: Hashes, documents: np.ndarray) -> np.ndarray:
    """Hashes of scattered documents (ascending), read run by run."""
    pieces = []
    for first in range(0, len(store), _SCAN):
        begin, end = np.searchsorted(documents, [first, first + _SCAN])
        if begin < end:
            pieces.append(store.hashes(first, min(len(store), first + _SCAN))[documents[begin:end] - first])
    return np.concatenate(pieces)
