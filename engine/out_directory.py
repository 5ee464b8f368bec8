"""What --out may not be: a directory that the command itself reads, or one that holds what nobody could get back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from engine.publish import STATE
from model.directories import lineage
from model.errors import InputError
from model.tokenizer import FILES
from model.weight_files import ADAPTER_FILES, MODEL_FILES, WRITTEN

_MODEL = (*WRITTEN, *MODEL_FILES, *(f"{name}.index.json" for name in MODEL_FILES), *ADAPTER_FILES)


def require_apart(out: str, reads: Mapping[str, str | None]) -> None:
    """See that nothing is read from where a command will write, whatever the path that leads there.

    Args:
        reads: directories by the options that name them; None, or a name of something else, is no directory. An
            adapter's is read with what it stands on.
    Raises:
        InputError: it is.
    """
    for option, directory in reads.items():
        if directory is not None and any(_is_same(each, out) for each in lineage(directory)):
            raise InputError(
                f"--out {out}: {option} {directory} is read from there, and would be replaced. Choose another --out."
            )


def require_run(out: str) -> None:
    """See that a directory can become a run's, or is one.

    Raises:
        InputError: what the run will publish would replace what is there, and no run that goes on has left it.
    """
    found = published(Path(out))
    if found is not None and not any(os.path.isdir(os.path.join(out, name)) for name in STATE):
        kind = "tokenizer" if found.name in FILES else "model"
        raise InputError(
            f"--out {out} holds a {kind} ({found.name}) and no run that could go on. Choose another --out, or have it "
            "set aside with --resume never."
        )


def published(directory: Path) -> Path | None:
    """One of the files of a model, or of a tokenizer alone, in a directory; None where it holds neither."""
    if not os.path.isdir(directory):
        return None
    return next((path for pattern in (*_MODEL, *FILES) for path in sorted(directory.glob(pattern))), None)


def _is_same(one: Path | str, other: Path | str) -> bool:
    """Also by a symbolic link, or in another case where the filesystem knows none; no where one of them is missing."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
