"""Where runs are written, and the memory and limits of this host."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engine.doctor.finding import Finding

GIB = 2**30
LITTLE_DISK, LITTLE_MEMORY, LITTLE_SHARED = 50 * GIB, 16 * GIB, 1 * GIB
FEW_FILES = 4096


def storage(out: Path, processes: int) -> Iterator[Finding]:
    """
    Args:
        out: the directory in which runs will be; it need not be there.
        processes: of this host, which share its memory.
    """
    yield disk(out)
    yield memory()
    if processes > 1:
        yield from shared_memory()
    yield from open_files()


def disk(out: Path) -> Finding:
    """Whether a file can be written, flushed and renamed there, and how much room there is."""
    place = existing(out)
    name = f"disk of {out}"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            file, renamed = Path(folder, "a"), Path(folder, "b")
            with open(file, "wb") as stream:
                stream.write(b"doctor")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(file, renamed)
    except OSError as error:
        remedy = "Give --out a directory that you may write to, with room."
        return Finding(name, "wrong", f"{place}: {error.strerror}", remedy)
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:,.0f} GiB free, writable"
    if free < LITTLE_DISK:
        remedy = "A checkpoint takes 12 bytes a parameter (13B: 156 GB), and --checkpoint.keep of them are kept."
        return Finding(name, "note", found, remedy)
    return Finding(name, "good", found)


def existing(path: Path) -> Path:
    """The nearest directory above that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def memory(info: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> Finding:
    """What this process may use: of the host, or of the container where that has a limit."""
    if not info.exists():
        return Finding("memory", "good", "unknown on this system")
    fields = dict(line.split(":", 1) for line in info.read_text(encoding="ascii").splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    found = f"{available / GIB:.0f} of {total / GIB:.0f} GiB available"
    limit = container_limit(cgroup)
    if limit is not None and limit < total:
        found += f"; this container may use {limit / GIB:.0f} GiB"
        available = min(available, limit)
    found += f"; {len(os.sched_getaffinity(0))} cores"
    if available < LITTLE_MEMORY:
        return Finding("memory", "note", found, "Enough for small models; --dry-run of a job says what it needs.")
    return Finding("memory", "good", found)


def container_limit(cgroup: Path) -> int | None:
    """Bytes that the container may use, by cgroup version 2 or 1; None for no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = cgroup / name
        if file.exists():
            text = file.read_text(encoding="ascii").strip()
            return int(text) if text.isdigit() else None
    return None


def shared_memory(place: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Ranks of a host exchange through it; containers give 64 MB unless they are told otherwise."""
    if place.is_dir() and (size := shutil.disk_usage(place).total) < LITTLE_SHARED:
        remedy = "Start the container with --ipc=host or --shm-size=16g: NCCL exchanges through it."
        yield Finding("/dev/shm", "note", f"{size / 2**20:.0f} MiB", remedy)


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        remedy = f"ulimit -n {'unlimited' if hard == resource.RLIM_INFINITY else hard}: shards and sockets take many."
        yield Finding("open files", "note", f"at most {soft}", remedy)
