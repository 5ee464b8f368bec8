"""Processes that torchrun has started: whether they reach each other, are alike, and see the same files."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from engine.doctor.finding import Finding
from engine.doctor.software import ROOT, first_line, version_of
from engine.doctor.storage import existing

# A network filesystem may show others a new file only after its cache of the directory has expired.
PATIENCE = 30.0


class Place(NamedTuple):
    """A rank, and what decides whether it can work with the others."""

    host: str
    versions: Mapping[str, str]


class Group(NamedTuple):
    """The ranks as torchrun names them."""

    rank: int
    world: int
    on_this_host: int


def group() -> Group | None:
    """None without torchrun."""
    if "RANK" not in os.environ:
        return None
    return Group(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


def ranks(out: Path, own: Sequence[Finding], timeout: timedelta = timedelta(minutes=3)) -> Iterator[Finding]:
    """Every rank calls it; rank 0 gets all that is to be said, the others nothing.

    Args:
        out: the directory in which runs will be.
        own: what this rank has found; what is wrong or worth a note on other hosts is added under their names.
    """
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=timeout)
    except Exception as error:
        remedy = "See --rdzv-endpoint, the port of it, and that the hosts reach each other (NCCL_SOCKET_IFNAME)."
        yield Finding("ranks", "wrong", f"they do not find each other: {first_line(error)}", remedy)
        return
    rank, world = dist.get_rank(), dist.get_world_size()
    said: list[Any] = [None] * world
    dist.all_gather_object(said, (Place(socket.gethostname(), versions()), list(own)))
    places = [place for place, _ in said]
    seen = sees_same_directory(existing(out))
    sums = exchange()
    dist.destroy_process_group()
    if rank:
        return
    yield likeness(places)
    hosts = sorted({place.host for place in places})
    yield from from_elsewhere([(place.host, findings) for place, findings in said])
    yield sums
    if len(hosts) > 1:
        blind = sorted({place.host for place, is_seen in zip(places, seen, strict=True) if not is_seen})
        yield shared_directory(out, hosts, blind)


def versions() -> dict[str, str]:
    """What must be the same everywhere."""
    found = {name: version_of(name) or "none" for name in ("torch", "triton", "flash-attn")}
    try:
        said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        found["checkout"] = said.stdout.strip() or "unknown"
    except OSError:
        found["checkout"] = "unknown"
    return found


def likeness(places: Sequence[Place]) -> Finding:
    """How many ranks there are where, and whether all have the same software."""
    counts = Counter(place.host for place in places)
    found = f"{len(places)} on {len(counts)} host{'s' if len(counts) > 1 else ''}"
    for name in places[0].versions:
        by_host = {place.host: place.versions[name] for place in places}
        if len(set(by_host.values())) > 1:
            unlike = ", ".join(f"{host} {version}" for host, version in by_host.items())
            return Finding(
                "ranks", "wrong", f"{found}; {name} differs: {unlike}", f"Install the same {name} everywhere."
            )
    if len(set(counts.values())) > 1:
        uneven = ", ".join(f"{host} {count}" for host, count in counts.items())
        return Finding("ranks", "note", f"{found}, uneven: {uneven}", "Sharding within hosts wants as many on each.")
    return Finding("ranks", "good", found)


def from_elsewhere(said: Sequence[tuple[str, Sequence[Finding]]]) -> Iterator[Finding]:
    """What ranks of other hosts have to mend, once a host."""
    here, told = said[0][0], set()
    for host, findings in said:
        for finding in findings:
            if host != here and finding.state != "good" and (host, finding.name) not in told:
                told.add((host, finding.name))
                yield finding._replace(name=f"{host}: {finding.name}")


def exchange(megabytes: int = 64, rounds: int = 5) -> Finding:
    """All-reduce as training does it: over NCCL where there are GPUs; right, and how fast."""
    import torch
    import torch.distributed as dist

    name, world = "all-reduce", dist.get_world_size()
    try:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
            over, peers = "NCCL", dist.new_group(backend="nccl")
        else:
            device, over, peers = torch.device("cpu"), "gloo", dist.group.WORLD
        values = torch.ones(megabytes * 2**18, device=device)  # fp32
        dist.all_reduce(values, group=peers)
        is_right = bool((values == world).all())
        began = time.monotonic()
        for _ in range(rounds):
            dist.all_reduce(values, group=peers)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.monotonic() - began) / rounds
    except Exception as error:
        remedy = "NCCL_DEBUG=INFO tells more; see NCCL_SOCKET_IFNAME, InfiniBand, and /dev/shm in containers."
        return Finding(name, "wrong", first_line(error), remedy)
    if not is_right:
        return Finding(
            name, "wrong", f"over {over}: sums are wrong", "A link or a card is broken: leave hosts out in turn."
        )
    # Every rank sends and receives 2 (n - 1) / n of the bytes.
    speed = 2 * (world - 1) / world * megabytes / 1024 / seconds
    return Finding(name, "good", f"right over {over}, {speed:.1f} GiB/s a rank" if world > 1 else f"right over {over}")


def sees_same_directory(place: Path, patience: float = PATIENCE) -> list[bool]:
    """Of each rank, whether it sees there what rank 0 has just written."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    said: list[Any] = [(str(place), uuid.uuid4().hex) if rank == 0 else None]
    dist.broadcast_object_list(said, src=0)
    directory, token = said[0]
    file = Path(directory, f".doctor-{token}")
    if rank == 0:
        with contextlib.suppress(OSError):  # said already, of the disk
            file.write_text(token, encoding="ascii")
    dist.barrier()
    until = time.monotonic() + patience
    while not (is_seen := _holds(file, token)) and time.monotonic() < until and world > 1:
        time.sleep(0.5)
    seen: list[Any] = [None] * world
    dist.all_gather_object(seen, is_seen)
    if rank == 0:
        file.unlink(missing_ok=True)
    return seen


def _holds(file: Path, token: str) -> bool:
    try:
        return file.read_text(encoding="ascii") == token
    except OSError:
        return False


def shared_directory(out: Path, hosts: Sequence[str], blind: Sequence[str]) -> Finding:
    if blind:
        remedy = "Mount one filesystem on all hosts, and give --out a directory on it: checkpoints are written by all."
        return Finding("shared directory", "wrong", f"{', '.join(blind)} do not see {out} of {hosts[0]}", remedy)
    return Finding("shared directory", "good", f"{out} is the same on {len(hosts)} hosts")
