"""Prepared text on disk: token shards beside one index, described by a manifest that is written last.

manifest.json               what is here; its presence says that all of it is
tokens/00000012.bin         ids of unit 12's documents, end to end, uint16 or uint32, little-endian; of conversations
                            uint32, in which the flag TRAINED marks the ids that are trained
offsets.npy                 uint64 [D+1], where each document begins among all tokens of this directory
hashes.npy                  uint64 [D, 2], BLAKE2b-128 of each document's text; of a conversation, half of it stands for
                            all messages and half for the first question
characters.npy              uint32 [D], Unicode code points of each document
files.jsonl  rejects.jsonl  what was found in each file; records that were refused, and why
tokenizer/                  the tokenizer that made the ids
units/                      only while preparing: units that are complete
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import sync_directory, sync_file, write_durably
from model.errors import InputError

FORMAT = 1
TRAINED = 1 << 31
MANIFEST = "prepared.json"
PLAN = "plan.prepared.json"
INDEX = ("offsets", "hashes", "characters")
# Open shards are bounded: a process may hold 1024 files by default.
_OPEN_SHARDS = 256
_PAGE = 4096


def text_hash(text: str) -> bytes:
    """128 bits that stand for a text."""
    return blake2b(text.encode(), digest_size=16).digest()


def fingerprint(tokenizer: str, digests: Sequence[str]) -> str:
    """128 bits in hex over which documents there are, in which order, tokenised how."""
    return blake2b(json.dumps([tokenizer, *digests]).encode(), digest_size=16).hexdigest()


def token_path(directory: Path, unit: int) -> Path:
    return directory / "tokens" / f"{unit:08d}.bin"


def rejects_path(directory: Path, unit: int) -> Path:
    return directory / "units" / f"{unit:08d}.rejects"


class UnitWriter:
    """Writes one unit's tokens as they come, and commits them with their index by a marker written last."""

    def __init__(self, directory: Path, unit: int, dtype: np.dtype) -> None:
        self._directory = directory
        self._unit = unit
        self._dtype = dtype
        self._path = token_path(directory, unit)
        self._beside = self._path.with_name(f".{unit:08d}.{os.getpid()}.tmp")
        self._tokens = open(self._beside, "wb")  # noqa: SIM115  closed by commit() or abandon()
        self._rejects_beside = directory / "units" / f".{unit:08d}.{os.getpid()}.rejects"
        self._rejects = open(self._rejects_beside, "w", encoding="utf-8")  # noqa: SIM115
        self._digest = blake2b(digest_size=16)
        self._lengths: list[int] = []
        self._characters: list[int] = []
        self._hashes = bytearray()

    def add(self, ids: np.ndarray, characters: int, digest: bytes) -> None:
        """Append a document.

        Args:
            ids: [L] of the shard's dtype.
        """
        assert ids.dtype == self._dtype
        content = ids.tobytes()
        self._tokens.write(content)
        self._digest.update(content)
        self._lengths.append(len(ids))
        self._characters.append(characters)
        self._hashes += digest

    def reject(self, record: dict[str, Any]) -> None:
        """Note a record that was refused."""
        self._rejects.write(json.dumps(record, ensure_ascii=False) + "\n")

    def commit(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Make the unit durable. Returns its facts, completed."""
        for file in (self._tokens, self._rejects):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        os.replace(self._beside, self._path)
        sync_directory(self._path.parent)
        os.replace(self._rejects_beside, rejects_path(self._directory, self._unit))
        lengths = np.array(self._lengths, "<u4")
        hashes = np.frombuffer(bytes(self._hashes), "<u8").reshape(-1, 2)
        stem = self._directory / "units" / f"{self._unit:08d}"
        beside = stem.with_name(f".{self._unit:08d}.{os.getpid()}.npz")  # savez appends this suffix where it is missing
        np.savez(beside, lengths=lengths, hashes=hashes, characters=np.array(self._characters, "<u4"))
        sync_file(beside)
        os.replace(beside, stem.with_suffix(".npz"))
        digest = blake2b(lengths.tobytes() + hashes.tobytes(), digest_size=16).hexdigest()
        tokens = int(lengths.sum(dtype=np.uint64))
        facts = {
            "unit": self._unit,
            "documents": len(lengths),
            "tokens": tokens,
            "digest": digest,
            "tokens_digest": self._digest.hexdigest(),
            **facts,
        }
        write_durably(stem.with_suffix(".json"), json.dumps(facts, ensure_ascii=False))
        return facts

    def abandon(self) -> None:
        """Remove what was written of a unit that failed."""
        for file, path in ((self._tokens, self._beside), (self._rejects, self._rejects_beside)):
            with suppress(OSError):
                file.close()
                path.unlink()


def committed_units(directory: Path) -> dict[int, Path]:
    """Markers of the units that are complete, by number."""
    return {int(path.stem): path for path in (directory / "units").glob("[0-9]*.json")}


def merge_index(directory: Path, units: list[dict[str, Any]]) -> None:
    """Join the units' indexes to one, in the units' order."""
    documents = sum(unit["documents"] for unit in units)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "offsets": ((documents + 1,), "<u8"),
        "hashes": ((documents, 2), "<u8"),
        "characters": ((documents,), "<u4"),
    }
    beside = {name: directory / f".{name}.tmp.npy" for name in INDEX}
    columns = {
        name: np.lib.format.open_memmap(beside[name], mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
        if documents
    }
    row, token = 0, 0
    for unit in units:
        if not unit["documents"]:
            continue
        with np.load(directory / "units" / f"{unit['unit']:08d}.npz") as part:
            end = row + unit["documents"]
            columns["offsets"][row:end] = token + np.cumsum(part["lengths"], dtype=np.uint64) - part["lengths"]
            columns["hashes"][row:end] = part["hashes"]
            columns["characters"][row:end] = part["characters"]
        row, token = end, token + unit["tokens"]
    for name, column in columns.items():
        if name == "offsets":
            column[row] = token
        column.flush()
        sync_file(beside[name])
        os.replace(beside[name], directory / f"{name}.npy")
    sync_directory(directory)


@dataclass(frozen=True)
class Shard:
    """One unit's place in its directory: rows [first_row, first_row + documents), tokens from first_token."""

    unit: int
    first_row: int
    documents: int
    first_token: int
    tokens: int


class Prepared:
    """A prepared directory, opened for reading. Its memory is the kernel's page cache, shared by all ranks.

    Attributes:
        manifest: as `prepare` wrote it.
        shards: in the order of units.
        offsets, hashes, characters: memory-mapped columns; empty arrays where there is no document.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.dtype = np.dtype(self.manifest["dtype"])
        self.shards: list[Shard] = []
        row, token = 0, 0
        for unit in self.manifest["units"]:
            self.shards.append(Shard(unit["unit"], row, unit["documents"], token, unit["tokens"]))
            row, token = row + unit["documents"], token + unit["tokens"]
        self._check_shards()
        self.offsets = self._column("offsets", (row + 1,), np.zeros(1, np.uint64))
        self.hashes = self._column("hashes", (row, 2), np.zeros((0, 2), np.uint64))
        self.characters = self._column("characters", (row,), np.zeros(0, np.uint32))
        if row and int(self.offsets[row]) != token:
            raise self._damage(self.directory / "offsets.npy", "does not fit the manifest")
        # One pass brings the pages into memory; they are needed in random order, and each would be waited for.
        self.offsets[:: _PAGE // 8].max()

    def verify(self) -> None:
        """Read every byte and compare it with what was written.

        Raises:
            InputError: names the first shard that differs.
        """
        for unit in self.manifest["units"]:
            path = token_path(self.directory, unit["unit"])
            if file_digest(path) != unit["tokens_digest"]:
                raise self._damage(path, "is not what was written")

    def _check_shards(self) -> None:
        for shard in self.shards:
            path = token_path(self.directory, shard.unit)
            expected = shard.tokens * self.dtype.itemsize
            if not path.is_file():
                raise self._damage(path, "is missing")
            if path.stat().st_size != expected:
                raise self._damage(path, f"has {path.stat().st_size} bytes instead of {expected}")

    def _column(self, name: str, shape: tuple[int, ...], empty: np.ndarray) -> np.ndarray:
        if not self.manifest["documents"]:
            return empty
        path = self.directory / f"{name}.npy"
        try:
            column = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise self._damage(path, "is missing") from None
        except (OSError, ValueError) as error:
            raise self._damage(path, f"is not readable ({error})") from None
        if column.shape != shape:
            raise self._damage(path, f"has shape {column.shape} instead of {shape}")
        return column

    def _damage(self, path: Path, problem: str) -> InputError:
        return InputError(f"{path} {problem}. Delete {self.directory} and prepare it again.")


class TokenFiles:
    """Reads from many shards, few of which are open at a time. Safe to share between threads.

    Tokens are read, not mapped: waiting for a page of mapped memory would hold the interpreter's lock, and with it the
    training thread. The kernel's page cache serves all ranks of a machine either way.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._one_at_a_time = threading.Lock()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file."""
        with self._one_at_a_time:
            descriptor = self._open.get(path)
            if descriptor is None:
                if len(self._open) >= _OPEN_SHARDS:
                    os.close(self._open.popitem(last=False)[1])
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                self._open[path] = descriptor
            else:
                self._open.move_to_end(path)
            return os.pread(descriptor, size, offset)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def file_digest(path: Path) -> str:
    """BLAKE2b-128 of a file's bytes, in hex."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_prepared(directory: str | os.PathLike[str]) -> bool:
    """Whether a path is a prepared directory, or a directory of prepared parts."""
    return any(True for _ in prepared_parts(directory))


def prepared_parts(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """The directory itself if it is prepared, else the prepared parts in it."""
    directory = Path(directory)
    if (directory / MANIFEST).is_file():
        yield directory
    elif directory.is_dir():
        yield from sorted(path.parent for path in directory.glob(f"part-*/{MANIFEST}"))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared directory.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{directory}: not prepared, or not to the end. Run tools/prepare.py with --out {directory}."
        ) from None
    except ValueError:
        raise InputError(f"{path}: damaged. Delete {directory} and prepare it again.") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path}: format {found}; this version reads format {FORMAT}. Delete {directory} and prepare it again."
        )
    return manifest
