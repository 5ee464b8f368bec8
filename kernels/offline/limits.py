"""What a compiled kernel is held to.

spills      none
memory      shared memory within what one program may have
accesses    most bytes are loaded and stored 16 at a time
products    16-bit matrix products become the matrix instruction that is meant
offsets     no address is made with a product that can leave 32 bits
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

import triton

from kernels.offline.compile import SHARED_MEMORY, Compiled
from kernels.offline.offsets import narrow_offsets
from kernels.offline.record import Launch

# A line of a kernel that says so and why is believed.
_FITS = "# fits 32 bits: "
_BYTES = {"f64": 8, "f32": 4, "i64": 8, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i8": 1}


def broken_limits(launch: Launch, found: Compiled, wide_share: float, products: str | None) -> Iterator[str]:
    """Limits that the kernel breaks, in words.

    Args:
        wide_share: of the bytes in the code, how many must move 16 at a time, where pointers are aligned.
        products: the instruction that matrix products should become, None for any.
    """
    if found.spilled:
        yield f"spills {found.spilled} bytes a thread"
    if found.shared > SHARED_MEMORY[found.arch]:
        yield f"needs {found.shared} bytes of shared memory, the chip has {SHARED_MEMORY[found.arch]}"
    if launch.has_aligned_pointers:
        for what, share in (("load", found.wide_loads), ("store", found.wide_stores)):
            if share < wide_share and _moves_much(found.ttir, what, launch):
                yield f"only {share:.0%} of the bytes it {what}s go 16 at a time"
    if products is not None and "tt.dot " in found.ttir and found.products != products:
        yield f"its products are {found.products}, not {products}"
    yield from narrow_offsets(found.ttir, set(_fitting_lines(launch.kernel, set())))


def _moves_much(ttir: str, what: str, launch: Launch) -> bool:
    """Whether one access of the program has 16 bytes for each of its threads."""
    threads = 32 * dict(launch.options).get("num_warps", 4)
    accesses = re.findall(rf"tt\.{what} .*tensor<((?:\d+x)+)!tt\.ptr<(\w+)>>", ttir)
    return any(prod(map(int, shape[:-1].split("x"))) * _BYTES[kind] >= 16 * threads for shape, kind in accesses)


def _fitting_lines(kernel: triton.JITFunction, seen: set[str]) -> Iterator[str]:
    """Lines of a kernel, and of what it calls, that say `fits 32 bits`, as `file.py:12`."""
    seen.add(kernel.__name__)
    file = Path(inspect.getfile(kernel.fn)).name
    lines = enumerate(kernel.raw_src, kernel.starting_line_number)
    yield from (f"{file}:{number}" for number, line in lines if _FITS in line)
    for word in set(re.findall(r"\w+", kernel.src)) - seen:
        other = kernel.fn.__globals__.get(word)
        if isinstance(other, triton.JITFunction):
            yield from _fitting_lines(other, seen)
