"""How the kernels with a matrix product are launched: a committed table, read once, never timed during a run.

`launches.json` holds, for every kernel, chip, number format and head width, the blocks, warps and pipeline stages
to launch with. `candidates` beside each kernel say what may stand there; the offline audit compiles every candidate
and holds the entry of the table to its limits, `tools/tune_kernels.py` measures them on a GPU and writes the table.

Kernels that only stream memory have no entry: theirs is a small pure function in their own file.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.backend import Chip

PATH = Path(__file__).with_name("launches.json")
ARCHITECTURES = (80, 90)


@functools.cache
def table_key(arch: int, dtype: torch.dtype, width: int) -> str:
    """What an entry is found by: `sm_90 16-bit 128`. bf16 and fp16 share their entries."""
    return f"sm_{90 if arch >= 90 else 80} {8 * dtype.itemsize}-bit {width}"


@functools.cache
def read_table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(PATH.read_text())


def chosen(kernel: str, chip: Chip, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Compile-time constants, num_warps and num_stages of a kernel.

    Args:
        kernel: its name in the table, such as `attention_fwd`.
        width: head width, a power of two.
    Raises:
        KeyError: the table has no such entry.
    """
    key = table_key(chip.arch, dtype, width)
    if _lookups is not None:
        module = sys._getframe(1).f_globals["__name__"]
        _lookups.append(Lookup(kernel, key, module, 90 if chip.arch >= 90 else 80, dtype, width))
    return dict(_trials.get((kernel, key)) or read_table()[kernel][key])


@dataclass(frozen=True)
class Lookup:
    """An entry that was asked for, by which module, and of what."""

    kernel: str
    key: str
    module: str
    arch: int
    dtype: torch.dtype
    width: int

    def candidates(self) -> list[dict[str, int]]:
        """What the module that launches the kernel says may stand there."""
        named = getattr(sys.modules[self.module], "candidates", None)
        return named(self.arch, self.dtype, self.width) if named else []


_lookups: list[Lookup] | None = None
_trials: Mapping[tuple[str, str], Mapping[str, int]] = {}


@contextmanager
def observed_table(trials: Mapping[tuple[str, str], Mapping[str, int]] | None = None) -> Iterator[list[Lookup]]:
    """Within the context `chosen` notes what it is asked for, in the list given, and tries other entries.

    Args:
        trials: entries to use instead of the table's, by kernel and key.
    """
    global _lookups, _trials
    before = _lookups, _trials
    _lookups, _trials = [], trials or {}
    try:
        yield _lookups
    finally:
        _lookups, _trials = before
