"""The bundled sample as files, for jobs that were given no data."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from samples.knowledge import load_knowledge
from samples.render import write_pretraining


def bundled_pretraining(directory: Path) -> tuple[Path, Path]:
    """Paths of `train.jsonl` and `held_out.jsonl` in a directory, written there unless they are there already.

    Several processes may call this at once: each file appears whole, and one that is right is left untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".rendering-") as beside:
        for name in write_pretraining(Path(beside), load_knowledge()):
            fresh, target = Path(beside) / f"{name}.jsonl", directory / f"{name}.jsonl"
            if not target.is_file() or target.read_bytes() != fresh.read_bytes():
                os.replace(fresh, target)
    return directory / "train.jsonl", directory / "held_out.jsonl"
