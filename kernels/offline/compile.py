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
    products: the matrix instruction, `wgmma` or `mma`, or none.
    ttir: Triton's intermediate representation, for what has to be read off the source's meaning.
    """

    arch: int
    registers: int
    spilled: int
    shared: int
    loads: int
    stores: int
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
    loads = max(_widest(r"ld\.global\S*", ptx), _widest_copy(ptx))
    stores = _widest(r"st\.global\S*", ptx)
    return Compiled(arch, registers, spilled, compiled.metadata.shared, loads, stores, products, compiled.asm["ttir"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread; local memory is where spills go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _widest(instruction: str, ptx: str) -> int:
    """Bytes a thread moves in the widest of some instructions."""
    widest = 0
    for text in re.findall(instruction, ptx):
        vector = re.search(r"\.v([248])\b", text)
        width = re.search(r"\.[bufs](\d+)", text)
        if width:
            widest = max(widest, int(width[1]) // 8 * (int(vector[1]) if vector else 1))
    return widest


def _widest_copy(ptx: str) -> int:
    """The same of asynchronous copies; the bulk copies of Hopper count as 16."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", ptx)
    return max([*(int(size, 0) for size in copies), 16 if "cp.async.bulk" in ptx else 0], default=0)
