"""Raw files to prepared directories: tokenised once, in parallel, in bounded memory; killed and resumed at will.

The corpus is cut into units (`units.py`). Worker processes tokenise them one at a time and commit each by itself,
so whoever starts again after a kill goes on with the units that are missing, and the result is the same to the byte.
A manifest, written last, says that everything is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from engine.data.encoders import Encoder, TextTokenizer, as_encoder
from engine.data.encodings import count_newlines, open_raw
from engine.data.pool import Job, run_workers
from engine.data.shards import FORMAT, MANIFEST, PLAN, committed_units, fingerprint, merge_index, rejects_path
from engine.data.sources import FileOptions, Listing, ReadOptions, list_files, probe
from engine.data.units import Unit, cut, unit_size
from engine.data.worker import Setting, tokenise
from engine.files import explain, locked, sync_directory, write_durably
from model.errors import InputError

# A worker process costs half a second and 100 MB: it must have this much to do.
_BYTES_PER_WORKER = 4 << 20


@dataclass(frozen=True)
class Progress:
    """How far a preparation is.

    done, total: bytes of raw files; resumed: those of `done` that an earlier run had finished.
    documents, tokens: of this run and earlier ones.
    seconds: since this run began.
    """

    done: int
    total: int
    resumed: int
    documents: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Raw bytes a second in this run."""
        return (self.done - self.resumed) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from this run's rate; None before anything is done."""
        return (self.total - self.done) / self.rate if self.done > self.resumed else None


def prepare(
    paths: Sequence[str | os.PathLike[str]],
    encoder: TextTokenizer | Encoder,
    out_dir: str | os.PathLike[str],
    options: FileOptions | None = None,
    part: tuple[int, int] = (1, 1),
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    unit_bytes: int | None = None,
) -> Path:
    """Tokenise raw files into a prepared directory, or go on with one that was interrupted.

    Several processes may call this with the same arguments at once: one works, the others wait for it.

    Args:
        paths: files, directories and glob patterns; each is one source, for weights.
        encoder: a tokenizer, for texts, or what makes ids of other records.
        out_dir: made if missing. With parts, part i writes to `out_dir/part-i-of-n`.
        part: (i, n), i from 1: which of n independent shares of the work this call does.
        workers: processes; by default one a core, fewer for little text. 1 works in this process.
        progress: called from time to time, never by two threads at once.
        unit_bytes: raw bytes of a unit of work; by default 16 MiB, more beyond 64 GiB. All parts need the same.
    Returns:
        the prepared directory.
    Raises:
        InputError: data that cannot be read, a directory that holds other data, or one that cannot be written.
    """
    encoder, options = as_encoder(encoder), (options or ReadOptions()).bare()
    index, parts = part
    if not 1 <= index <= parts:
        raise InputError(f"--part {index}/{parts}: there is no such part. Choose one from 1 to {parts}.")
    listing = list_files(paths)
    directory = Path(out_dir) if parts == 1 else Path(out_dir) / f"part-{index:05d}-of-{parts:05d}"
    size = unit_bytes or unit_size(listing.size)
    plan = _plan(listing, encoder, options, size, part)
    try:
        if _is_finished(directory, plan):
            return directory
        (directory / "tokens").mkdir(parents=True, exist_ok=True)
        (directory / "units").mkdir(exist_ok=True)
        with locked(directory / ".lock"):
            if _is_finished(directory, plan):
                return directory
            write_durably(directory / PLAN, json.dumps(plan, ensure_ascii=False))
            _Preparation(directory, plan, listing, encoder, options, part, workers, progress, size).run()
    except OSError as error:
        raise InputError(f"{directory}: {explain(error)}") from None
    return directory


def preparation_key(
    paths: Sequence[str | os.PathLike[str]], encoder: TextTokenizer | Encoder, options: FileOptions | None = None
) -> str:
    """128 bits in hex that change with the files (names, sizes, times), the encoder and the options.

    A directory named after it holds the right data or none.
    """
    listing = list_files(paths)
    bare = (options or ReadOptions()).bare()
    plan = _plan(listing, as_encoder(encoder), bare, unit_size(listing.size), (1, 1))
    return _digest({"id": plan["id"], "stamp": plan["stamp"]})


def _plan(listing: Listing, encoder: Encoder, options: FileOptions, size: int, part: tuple[int, int]) -> dict[str, Any]:
    """What a directory is going to hold, by digests: `id` is the same on every machine and for every part."""
    files = [(file.source, file.name, file.size, _beginning(file.path)) for file in listing.files]
    facts = [FORMAT, files, encoder.fingerprint, dataclasses.asdict(options), size]  # type: ignore[call-overload]
    return {"id": _digest(facts), "stamp": _stamp(listing), "part": list(part)}


def _beginning(path: str) -> str:
    """Tells files of one name and size apart, as far as their first 4 KiB do."""
    with open_raw(path) as file:
        return blake2b(file.read(4096), digest_size=16).hexdigest()


def _stamp(listing: Listing) -> str:
    """Changes when a file does: sizes in bytes and times of change in nanoseconds."""
    status = [os.stat(file.path) for file in listing.files]
    return _digest([(entry.st_size, entry.st_mtime_ns) for entry in status])


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, ensure_ascii=True).encode(), digest_size=16).hexdigest()


def _is_finished(directory: Path, plan: dict[str, Any]) -> bool:
    """Whether the directory holds all of this plan.

    Raises:
        InputError: it holds something else.
    """
    try:
        found = json.loads((directory / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        raise InputError(f"{directory / PLAN}: damaged. Delete {directory} and prepare it again.") from None
    if found != plan:
        what = "other versions of these files" if found["id"] == plan["id"] else "other data or options"
        raise InputError(f"{directory}: it holds a preparation of {what}. Delete it, or choose another --out.")
    if not (directory / MANIFEST).is_file():
        return False
    # All that a kill behind the manifest can have left over.
    shutil.rmtree(directory / "units", ignore_errors=True)
    return True


class _Preparation:
    """The work that is left in one directory."""

    def __init__(
        self,
        directory: Path,
        plan: dict[str, Any],
        listing: Listing,
        encoder: Encoder,
        options: FileOptions,
        part: tuple[int, int],
        workers: int | None,
        progress: Callable[[Progress], None] | None,
        unit_bytes: int,
    ) -> None:
        self.directory = directory
        self.plan = plan
        self.listing = listing
        self.encoder = encoder
        self.options = options
        self.part = part
        self.progress = progress
        self.unit_bytes = unit_bytes
        work = listing.size // part[1]
        self.workers = workers or max(1, min(len(os.sched_getaffinity(0)), work // _BYTES_PER_WORKER))
        self.setting = Setting(directory, options)
        self.began = time.monotonic()
        self.done = self.resumed = self.documents = self.tokens = 0

    def run(self) -> None:
        for folder in ("tokens", "units"):
            for leftover in (self.directory / folder).glob(".*"):
                leftover.unlink(missing_ok=True)  # a worker that outlives its killed parent may just be done with it
        self.files = [probe(file, self.options) for file in self.listing.files]
        self._save_tokenizer()
        self.committed = committed_units(self.directory)
        jobs = self._jobs()
        if self.workers == 1:
            for unit, files in jobs:
                self._report(unit, tokenise(unit, files, self.encoder, self.setting))
        else:
            run_workers(self.workers, jobs, self.encoder, self.setting, self._report)
        self._finish()

    def _jobs(self) -> Iterator[Job]:
        """Units of this part that are still to be done, with their files."""
        index, parts = self.part

        def is_wanted(unit: int) -> bool:
            return unit % parts == index - 1 and unit not in self.committed

        for unit in cut(self.files, self.options, self.unit_bytes, is_wanted):
            if unit.index % parts != index - 1:
                self._advance(unit.size, is_resumed=True)
            elif unit.index in self.committed:
                facts = json.loads(self.committed[unit.index].read_text(encoding="utf-8"))
                self._advance(unit.size, facts, is_resumed=True)
            else:
                yield unit, {segment.file: self.files[segment.file] for segment in unit.segments}

    def _report(self, unit: Unit, facts: dict[str, Any]) -> None:
        self._advance(unit.size, facts, is_resumed=False)
        if self.progress is not None:
            seconds = time.monotonic() - self.began
            self.progress(Progress(self.done, self.listing.size, self.resumed, self.documents, self.tokens, seconds))

    def _advance(self, size: int, facts: dict[str, Any] | None = None, *, is_resumed: bool) -> None:
        self.done += size
        self.resumed += size * is_resumed
        if facts is not None:
            self.documents += facts["documents"]
            self.tokens += facts["tokens"]

    def _save_tokenizer(self) -> None:
        target = self.directory / "tokenizer"
        if not target.is_dir():
            beside = self.directory / ".tokenizer.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            self.encoder.tokenizer.save(beside)
            os.replace(beside, target)
            sync_directory(self.directory)

    def _finish(self) -> None:
        """Join the units' indexes, lists and counts; the manifest makes the directory complete."""
        if _stamp(self.listing) != self.plan["stamp"]:
            raise InputError(
                f"A file of {', '.join(self.listing.paths)} changed while it was being prepared. Delete "
                f"{self.directory} and prepare it again."
            )
        paths = committed_units(self.directory)
        units = [json.loads(paths[unit].read_text(encoding="utf-8")) for unit in sorted(paths)]
        merge_index(self.directory, units)
        files = self._per_file(units)
        rejects = self._rejects(units)
        _write_lines(self.directory / "files.jsonl", files)
        _write_lines(self.directory / "rejects.jsonl", rejects)
        tokenizer = self.encoder.tokenizer
        manifest = {
            "format": FORMAT,
            "plan": self.plan["id"],
            "part": list(self.part),
            "fingerprint": fingerprint(self.encoder.fingerprint, [unit["digest"] for unit in units]),
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "dtype": self.encoder.dtype.str,
            "options": dataclasses.asdict(self.options),  # type: ignore[call-overload]
            "sources": [_printable(path) for path in self.listing.paths],
            "ignored_files": self.listing.ignored,
            **{name: sum(unit[name] for unit in units) for name in ("documents", "tokens")},
            **{name: sum(file[name] for file in files) for name in self.options.counts[1:]},
            "encodings": _count(file["encoding"] for file in files),
            **self.encoder.facts,
            "units": [self._unit_entry(unit) for unit in units],
        }
        write_durably(self.directory / MANIFEST, json.dumps(manifest, ensure_ascii=False))
        assert _is_finished(self.directory, self.plan)

    def _unit_entry(self, unit: dict[str, Any]) -> dict[str, Any]:
        """What the manifest keeps of a unit; `sources` counts its documents by source, in order."""
        entry = {name: unit[name] for name in ("unit", "documents", "tokens", "digest", "tokens_digest")}
        sources: dict[int, int] = {}
        for file in unit["files"]:
            source = self.files[file["file"]].source
            sources[source] = sources.get(source, 0) + file["documents"]
        return {**entry, "sources": sorted(sources.items())}

    def _per_file(self, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
        totals: dict[int, dict[str, int]] = {}
        for unit in units:
            for numbers in unit["files"]:
                total = totals.setdefault(numbers["file"], {})
                for name, number in numbers.items():
                    total[name] = number if name == "file" else total.get(name, 0) + number
        lines = []
        for index in sorted(totals):
            file = self.files[index]
            kind = {"format": file.format, "encoding": file.encoding or "utf-8", "document": file.document or "record"}
            counts = {name: number for name, number in totals[index].items() if name != "file"}
            lines.append({"file": _printable(file.path), "source": file.source, **kind, **counts})
        return lines

    def _rejects(self, units: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Refused records with lines counted from their file's beginning, in one pass over each such file."""
        file, position, lines = -1, 0, 0
        for unit in units:
            with open(rejects_path(self.directory, unit["unit"]), encoding="utf-8") as stream:
                for reject in map(json.loads, stream):
                    path = self.files[reject["file"]].path
                    if reject["file"] != file:
                        file, position, lines = reject["file"], 0, 0
                    lines += count_newlines(path, reject["start"], position)
                    position = reject["start"]
                    yield {"file": _printable(path), "line": lines + reject["line"], "reason": reject["reason"]}


def _printable(path: str) -> str:
    """A file's name with bytes that are no UTF-8 spelt out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _count(values: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
