"""The bundled sample as files, for jobs that were given no data."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.building import make_run_directory
from engine.launch import is_main_process
from model.errors import InputError
from samples.dialogues import write_dialogues
from samples.evaluation import write_evaluation
from samples.knowledge import Knowledge, load_knowledge
from samples.preferences import write_preferences, write_prompts
from samples.render import write_pretraining


@contextmanager
def sample_folder(run: Path | str, is_dry: bool) -> Iterator[Path]:
    """Where a run keeps its sample: a folder of its directory; of a dry run, one that is gone afterwards.

    A run that is refused before anything but its sample is there leaves no directory that was not there before.
    """
    if is_dry:
        with tempfile.TemporaryDirectory() as beside:
            yield Path(beside)
        return
    directory, folder = Path(run), Path(run) / "sample"
    fresh = [path for path in (folder, directory, *directory.parents) if not path.exists()]
    make_run_directory(directory)
    try:
        yield folder
    except InputError:
        if folder in fresh and is_main_process() and {*os.listdir(directory)} <= {folder.name}:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others may have written beside it by now
                for path in fresh[1:]:
                    path.rmdir()
        raise


def bundled_pretraining(directory: Path) -> tuple[Path, Path]:
    """Paths of documents, `train.jsonl` and `held_out.jsonl`, in a directory, written there unless they are there.

    Several processes may call this at once: each file appears whole, and one that is right is left untouched.
    """
    return _bundle(directory, write_pretraining)


def bundled_dialogues(directory: Path) -> tuple[Path, Path]:
    """The same of conversations: objects with id, kind and messages."""
    return _bundle(directory, write_dialogues)


def bundled_preferences(directory: Path) -> tuple[Path, Path]:
    """The same of comparisons: objects with id, prompt and graded responses."""
    return _bundle(directory, write_preferences)


def bundled_prompts(directory: Path) -> tuple[Path, Path]:
    """The same of conversations about a keyed question: objects with id, kind, messages and the keys."""
    return _bundle(directory, write_prompts)


def bundled_evaluation(directory: Path) -> Path:
    """The directory with what models are evaluated on, written there in the same way: see `samples.evaluation`."""
    _write(directory, write_evaluation)
    return directory


def bundled_tasks(directory: Path, with_reward: bool) -> list[str]:
    """What `tools/evaluate_model.py` asks of a model when it is given no tasks, of files in a directory.

    The protocols are those by which a model of a few million parameters can show what it has learnt: of options it
    knows texts, not letters, and entities are asked for in the words that it was trained on (samples/README.md).

    Args:
        with_reward: whether there is a reward model to judge answers.
    """
    files, (_, held_out) = bundled_evaluation(directory / "evaluation"), bundled_pretraining(directory)
    tasks = [
        f"cmb={files}/choice.jsonl,label=choice,protocol=text",
        f"entities={files}/entities.jsonl,format=short,types=疾病+症状+检查+药物,max_new_tokens=96",
        "questions,answers=2",
        f"qa={files}/qa.jsonl,max_new_tokens=64",
        f"dialogue={files}/dialogue.jsonl,max_new_tokens=64",
        f"attitudes={files}/attitudes.json,orders=10",
        f"perplexity={held_out}",
    ]
    return [*tasks, f"reward={files}/qa.jsonl,max_new_tokens=64,limit=150"] if with_reward else tasks


def _bundle(directory: Path, write: Callable[[Path, Knowledge], Any]) -> tuple[Path, Path]:
    _write(directory, write)
    return directory / "train.jsonl", directory / "held_out.jsonl"


def _write(directory: Path, write: Callable[[Path, Knowledge], Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".rendering-") as beside:
        write(Path(beside), load_knowledge())
        for fresh in sorted(Path(beside).iterdir()):
            target = directory / fresh.name
            if not target.is_file() or target.read_bytes() != fresh.read_bytes():
                os.replace(fresh, target)
