"""The GPUs: whether there are any, whether torch reaches them, and whether our kernels run on them."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.doctor.finding import Finding
from engine.doctor.software import build_of, first_line

OLDEST_ARCHITECTURE = (8, 0)  # A100: bf16 products, asynchronous copies


class Card(NamedTuple):
    """A GPU as the driver names it, whether torch reaches it or not."""

    name: str
    memory: str
    driver: str


def gpus() -> Iterator[Finding]:
    """The cards, the way to them, and a kernel run on each."""
    try:
        import torch
    except Exception:
        return  # said already
    listed = cards()
    if not torch.cuda.is_available():
        yield unreachable(listed, build_of(torch.version), _reason(torch))
        return
    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    names = sorted({f"{found.name}, {found.total_memory / 2**30:.0f} GiB" for found in properties})
    driver = f", driver {listed[0].driver}" if listed else ""
    if len(names) > 1:
        remedy = "The slowest and the smallest set the pace: choose equal ones with CUDA_VISIBLE_DEVICES."
        yield Finding("GPUs", "note", f"{count}, unlike: {'; '.join(names)}{driver}", remedy)
    else:
        yield Finding("GPUs", "good", f"{count} × {names[0]}{driver}")
    old = [found.name for found in properties if (found.major, found.minor) < OLDEST_ARCHITECTURE]
    if old:
        wanted = "Use an A100, an H100 or a newer one: older ones have no bf16."
        yield Finding("architecture", "wrong", f"too old: {', '.join(sorted(set(old)))}", wanted)
        return
    yield compiler()
    yield from (finding for index in range(count) for finding in kernel_runs(index))
    yield nccl(count)


def cards() -> list[Card]:
    """What nvidia-smi says; nothing where it is not there or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    fields = "--query-gpu=name,memory.total,driver_version"
    try:
        said = subprocess.run(
            ["nvidia-smi", fields, "--format=csv,noheader"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = said.stdout.splitlines() if said.returncode == 0 else []
    return [Card(*(part.strip() for part in line.split(","))) for line in lines if line.count(",") == 2]


def _reason(torch: object) -> str:
    """Why CUDA does not start, in torch's words."""
    try:
        torch.cuda.init()  # type: ignore[attr-defined]
    except Exception as error:
        return first_line(error)
    return ""


def unreachable(listed: list[Card], build: str, reason: str) -> Finding:
    """No GPU that torch could use: is there none, is the driver too old, or is it the wrong torch?"""
    is_there = bool(listed) or Path("/proc/driver/nvidia/version").exists()
    if not is_there:
        return Finding("GPUs", "note", "none: everything runs on the CPU", "Enough for make demo; not for real models.")
    there = (
        f"{len(listed)} × {listed[0].name}, driver {listed[0].driver}" if listed else "a driver, but no card answers"
    )
    if build == "the CPU alone":
        remedy = "This torch was built without CUDA: install the build for your driver, as pytorch.org says."
        return Finding("GPUs", "wrong", f"{there}; torch does not reach them", remedy)
    remedy = (
        f"torch is built for {build}: update the driver, or install a torch for an older CUDA. In a container, pass "
        "the GPUs through (--gpus all). See that CUDA_VISIBLE_DEVICES is not empty."
    )
    return Finding("GPUs", "wrong", f"{there}; torch says: {reason or 'no device is available'}", remedy)


def compiler() -> Finding:
    """Triton builds a small launcher in C for every kernel: that takes a compiler and Python's headers."""
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if found is None:
        return Finding("C compiler", "wrong", "none", "Install gcc: Triton compiles the launchers of kernels with it.")
    if not header.exists():
        remedy = "Install Python's headers (python3-dev): Triton compiles against them."
        return Finding("C compiler", "wrong", f"{found}, but {header} is missing", remedy)
    return Finding("C compiler", "good", found)


def kernel_runs(index: int) -> Iterator[Finding]:
    """One of our kernels on one GPU, against its reference. Nothing is said where all is well, but for the first."""
    name = f"kernels on GPU {index}"
    try:
        import torch

        from kernels.rms_norm import rms_norm, rms_norm_reference

        with torch.cuda.device(index):
            generator = torch.Generator("cuda").manual_seed(0)
            x = torch.randn(64, 1024, device="cuda", generator=generator)
            weight = torch.ones(1024, device="cuda")
            error = (rms_norm(x, weight, 1e-6) - rms_norm_reference(x, weight, 1e-6)).abs().max().item()
    except Exception as error_raised:
        remedy = "Kernels cannot be compiled or run: see the driver, the compiler and that ~/.triton can be written."
        yield Finding(name, "wrong", first_line(error_raised), remedy)
        return
    if error > 1e-5:
        yield Finding(name, "wrong", f"RMSNorm is off by {error:.1e}", "Run make test-gpu, and report what it says.")
    elif index == 0:
        yield Finding(name, "good", f"RMSNorm compiled, off by {error:.0e}")


def nccl(count: int) -> Finding:
    import torch.distributed as dist

    if not dist.is_nccl_available():
        remedy = "Install a torch that has it, for more than one GPU."
        return Finding("NCCL", "wrong" if count > 1 else "note", "not in this torch", remedy)
    import torch

    return Finding("NCCL", "good", ".".join(map(str, torch.cuda.nccl.version())))
