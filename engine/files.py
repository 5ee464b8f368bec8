"""Writing so that a crash, at any moment, leaves the old or the new and never a half.

A file is durable once its bytes and then its directory entry have been flushed. `rename` within a directory is
the only step that readers see, so everything here is: write beside, flush, rename, flush the directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from model.errors import InputError

DELETED = ".deleted"
"""Suffix of a directory on its way out; whoever tidies up may finish the job."""


def sync_file(path: Path) -> None:
    """Flush a file's bytes, whoever wrote them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries: names created, renamed or removed in it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems have no such call for directories; there the server orders the entries.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush every file below `directory`, then the directories, innermost first."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync_file(Path(parent, name))
        sync_directory(Path(parent))


def write_durably(path: Path, text: str) -> None:
    """Write or replace a small text file; readers see the old content or all of the new."""
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_directory(path.parent)


def digest_files(*paths: Path) -> str:
    """128 bits in hex over the bytes of one file or several, in this order."""
    digests = []
    for path in paths:
        digests.append(hashlib.sha256())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digests[-1].update(block)
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(one.digest() for one in digests))
    return whole.hexdigest()[:32]


def remove_directory(directory: Path) -> None:
    """Delete a directory. It loses its name first, so that being killed here leaves nothing that looks whole."""
    if directory.suffix != DELETED:
        if not directory.exists():
            return
        doomed = directory.with_name(directory.name + DELETED)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(directory, doomed)
        directory = doomed
        sync_directory(directory.parent)
    shutil.rmtree(directory)


def discard_directory(directory: Path) -> None:
    """Delete what is left of a failed attempt, as far as the filesystem still allows."""
    with contextlib.suppress(OSError):
        remove_directory(directory)


def require_new(path: Path) -> None:
    """See that a path is free, or an empty directory's. Raises InputError: it is not."""
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--out {path} exists, and nothing is overwritten. Choose another, or remove it first.")


@contextlib.contextmanager
def new_directory(path: Path, size: int = 0, may_repeat: bool = False) -> Iterator[Path]:
    """A folder beside `path` that takes its name, flushed, when the block ends well, and goes when it does not.

    Args:
        size: bytes that will be written; there must be room for them.
        may_repeat: a directory that holds the very files that were written stays as it is.
    Raises:
        InputError: `path` holds something else; there is no room; the filesystem refuses.
    """
    if path.name in ("", ".."):
        raise InputError(f"--out {path} names no new directory. Give one a name, as in --out {path / 'served'}.")
    place = path.resolve() if path.is_dir() else path  # of a link to an empty directory, what it leads to
    beside = place.with_name(f".{place.name}.converting")
    try:
        if not may_repeat:
            require_new(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.parent).free
        if free < size:
            raise InputError(
                f"--out {path}: {human_size(size)} are needed and {human_size(free)} are free there. Choose another."
            )
        shutil.rmtree(beside, ignore_errors=True)  # what a command that was killed has left
        beside.mkdir()
        yield beside
        if may_repeat and _have_same_files(beside, path):
            return
        require_new(path)
        sync_tree(beside)
        os.rename(beside, place)
        sync_directory(place.parent)
    except OSError as error:
        raise InputError(f"--out {path}: {explain(error)}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _have_same_files(one: Path, other: Path) -> bool:
    """Whether two directories without folders hold the same, to the byte."""
    if not other.is_dir():
        return False
    contents = [{path.name: path.is_file() and path.read_bytes() for path in each.iterdir()} for each in (one, other)]
    return contents[0] == contents[1]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for this process; the lock ends with the process, however that ends.

    Some filesystems offer no locks (Lustre, as it is usually mounted). There the work goes on without, and says so.

    Raises:
        OSError: the file cannot be opened for writing.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            _say_unlocked(path.parent)
        yield


def claim(file: IO[Any], busy: str, unlocked: str) -> None:
    """Take an open file's lock for this process, at once or not at all; it ends with the file.

    Args:
        busy: what to say where another process has it.
        unlocked: what to say where the filesystem offers no locks; the work then goes on without.
    Raises:
        InputError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(busy) from None
    except OSError:
        print(unlocked, file=sys.stderr, flush=True)


@functools.cache
def _say_unlocked(directory: Path) -> None:
    print(
        f"{directory}: its filesystem offers no locks. Let no two jobs prepare data there at the same time.",
        file=sys.stderr,
        flush=True,
    )


def explain(error: OSError) -> str:
    """What an operating system's error means, and its remedy: two sentences without the first one's subject."""
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk or the quota is full{place}. Free some space, or choose another --out."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"it may not be written{place}. Choose an --out where this user can write."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"a file stands where a directory is needed{place}. Move it, or choose another --out."
    reason = error.strerror or str(error)
    return f"{reason}{place}. See to the filesystem, or choose another --out."


def human_size(count: int) -> str:
    """Bytes in the largest decimal unit that leaves a figure of 1 or more: 156000000000 is "156.0 GB"."""
    size, units = float(count), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.1f} {units[0]}" if units[0] != "bytes" else f"{count} bytes"
