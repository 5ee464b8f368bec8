"""Compile a recorded launch for a chip that is not there, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.offline.record import Launch

# Shared memory of one program, bytes: of 164 and 228 KB a multiprocessor has, 1 KB is the system's.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """Resources and instructions of one kernel on one chip.

    registers: a thread; spilled and shared: bytes, a thread and a program.
    loads, stores: widest access to global memory, bytes a thread; asynchronous copies count as loads.
    wide_loads, wide_stores: share of the bytes that accesses of 16 bytes move, every instruction counted once.
    products: the matrix instruction, `wgmma` or `mma`, or none.
    ttir: Triton's intermediate representation, for what has to be read off the source's meaning.
    """

    arch: int
    registers: int
    spilled: int
    shared: int
    loads: int
    stores: int
    wide_loads: float
    wide_stores: float
    products: str | None
    ttir: str


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for sm_80 or sm_90. Needs no GPU and no driver; takes from a tenth of a second to several.

    Raises:
        RuntimeError: the kernel was imported under TRITON_INTERPRET=1, or does not compile.
    """
    source = ASTSource(
        launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    ptx = compiled.asm["ptx"]
    registers, spilled = _resources(compiled.asm["cubin"])
    products = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else None
    loads, stores = _widths("ld", ptx) + _copy_widths(ptx), _widths("st", ptx)
    accesses = max(loads, default=0), max(stores, default=0), _wide_share(loads), _wide_share(stores)
    return Compiled(arch, registers, spilled, compiled.metadata.shared, *accesses, products, compiled.asm["ttir"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread; local memory is where spills go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _widths(instruction: str, ptx: str) -> list[int]:
    """Bytes a thread moves in each `ld.global` or `st.global`."""
    widths = []
    for text in re.findall(rf"{instruction}\.global\S*", ptx):
        vector = re.search(r"\.v([248])\b", text)
        width = re.search(r"\.[bufs](\d+)", text)
        if width:
            widths.append(int(width[1]) // 8 * (int(vector[1]) if vector else 1))
    return widths


def _copy_widths(ptx: str) -> list[int]:
    """The same of asynchronous copies; the bulk copies of Hopper count as 16."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", ptx)
    return [int(size, 0) for size in copies] + [16] * ptx.count("cp.async.bulk.tensor")


def _wide_share(widths: list[int]) -> float:
    return sum(width for width in widths if width >= 16) / max(1, sum(widths))
