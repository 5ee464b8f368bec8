"""What makes a checkpoint complete: a list of its files, written last, and the check of every shard against it.

A shard is a safetensors file: 8 bytes with the header's length, the header in JSON, the tensors' bytes. DCP notes
in the header where each piece lies in its full tensor. The manifest holds each file's size and the digest of its
header, so a missing, truncated or exchanged file is noticed before any tensor is touched. It does not hold a
digest of the tensors themselves: reading 150 GB twice would cost more than it finds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from engine.files import write_durably
from engine.masters import Master
from model.errors import InputError

COMPLETE = "COMPLETE"
SHARDS = "*.safetensors"
SCHEMA = 1

# Names of the safetensors format.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a piece within its full tensor."""


class DamagedFile(InputError):
    """A file of a checkpoint is not what was written. The message names it and says how it differs, no more:
    the remedy depends on what else there is."""


@dataclass
class StoredTensor:
    """A tensor as the shards hold it: the name of its dtype, and its pieces."""

    dtype: str
    chunks: set[Chunk] = field(default_factory=set)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full tensor."""
        ends = ([offset + size for offset, size in zip(*chunk, strict=True)] for chunk in self.chunks)
        return tuple(map(max, zip(*ends, strict=True)))


def read_header(shard: Path) -> tuple[dict[str, Any], str]:
    """The parsed header of a safetensors file and its SHA-256.

    Raises:
        DamagedFile: no header, or its tensors do not end where the file does.
    """
    size = shard.stat().st_size
    with open(shard, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= size - 8:
            raise DamagedFile(f"{shard} has no safetensors header")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
    except (ValueError, LookupError, AttributeError, TypeError):
        raise DamagedFile(f"{shard} has a header that is not readable") from None
    if end != size:
        raise DamagedFile(f"{shard} has {size} bytes where its header tells of {end}")
    return header, hashlib.sha256(prefix + raw).hexdigest()


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, from the headers of its shards."""
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(directory.glob(SHARDS)):
        header, _ = read_header(shard)
        placement = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        for name, entry in header.items():
            tensor = tensors.setdefault(name, StoredTensor(entry["dtype"]))
            tensor.chunks.add((tuple(placement[name]["saved_offsets"]), tuple(entry["shape"])))
    return tensors


def check_written(directory: Path, planned: Metadata) -> None:
    """Reopen every shard's header: do the shards hold just the pieces that the ranks planned to write?

    Raises:
        DamagedFile: a shard is damaged, or a planned piece is not there.
    """
    stored = stored_tensors(directory)
    for name, plan in planned.state_dict_metadata.items():
        assert isinstance(plan, TensorStorageMetadata), f"{name} is no tensor: it belongs in trainer.json"
        chunks = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in plan.chunks}
        dtype = DTYPE_NAMES[plan.properties.dtype]
        found = stored.get(name, StoredTensor(dtype))
        if found != StoredTensor(dtype, chunks):
            raise DamagedFile(
                f"{directory}: {len(found.chunks & chunks)} of {len(chunks)} pieces of {name} arrived. "
                "All ranks must write to one filesystem: put --out on a shared one."
            )


def write_manifest(directory: Path, step: int, world: int) -> None:
    """List the directory's files in COMPLETE. Everything else must be on disk already."""
    files = {path.name: _facts(path) for path in sorted(directory.iterdir())}
    manifest = {"schema": SCHEMA, "step": step, "world_size": world, "files": files}
    write_durably(directory / COMPLETE, json.dumps(manifest, indent=1) + "\n")


def is_complete(directory: Path) -> bool:
    return (directory / COMPLETE).is_file()


def check_manifest(directory: Path) -> None:
    """Compare the directory with its COMPLETE.

    Raises:
        DamagedFile: a listed file is missing, of another size or with another header; or a shard is not listed.
        InputError: another version of this program wrote it.
    """
    marker = directory / COMPLETE
    try:
        manifest = json.loads(marker.read_text(encoding="utf-8"))
        schema, files = manifest["schema"], dict(manifest["files"])
    except FileNotFoundError:
        raise DamagedFile(f"{directory} has no {COMPLETE}: its writing never ended") from None
    except (ValueError, LookupError, TypeError):
        raise DamagedFile(f"{marker} is not readable") from None
    if schema != SCHEMA:
        raise InputError(f"{marker} is of format {schema}; this version reads {SCHEMA}. Resume with the one it is of.")
    for name, facts in files.items():
        path = directory / name
        if not path.is_file():
            raise DamagedFile(f"{path} is missing")
        if path.stat().st_size != facts["bytes"]:
            raise DamagedFile(f"{path} has {path.stat().st_size} bytes where {facts['bytes']} were written")
        if _facts(path) != facts:
            raise DamagedFile(f"{path} is not the file that was written")
    for path in directory.glob(SHARDS):
        if path.name not in files:
            raise DamagedFile(f"{path} does not belong to this checkpoint")


def _facts(path: Path) -> dict[str, Any]:
    """Size, and the digest of what is cheap to read: a shard's header, or all of a small file."""
    if path.match(SHARDS):
        digest = read_header(path)[1]
    else:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def state_bytes(tensors: Mapping[str, torch.Tensor | Master]) -> int:
    """Bytes of a checkpoint's tensors, each counted once whatever the number of ranks."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors.values())
