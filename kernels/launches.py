"""How the kernels with a matrix product are launched: a committed table, read once, never timed during a run.

`launches.json` holds, for every kernel, chip, number format and head width, the blocks, warps and pipeline stages
to launch with. `candidates` beside each kernel say what may stand there; the offline audit compiles every candidate
and holds the entry of the table to its limits, `tools/tune_kernels.py` measures them on a GPU and writes the table.

Kernels that only stream memory have no entry: theirs is a small pure function in their own file.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from kernels.backend import Chip

PATH = Path(__file__).with_name("launches.json")
ARCHITECTURES = (80, 90)


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
    return dict(read_table()[kernel][table_key(chip.arch, dtype, width)])
