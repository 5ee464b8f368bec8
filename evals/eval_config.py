"""Options of tools/evaluate_model.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.publish import MODEL_COMPLETE
from model.errors import InputError

TRAINED = ("ckpt/ppo", "ckpt/rejection", "ckpt/sft", "ckpt/pretrain")
"""Where the stages of training leave their models by default."""


@dataclass
class EvaluationConfig:
    """Evaluate models: multiple choice, entities, open answers, dialogue, attitude scales, rewards, perplexity."""

    model: list[str] = field(default_factory=list)
    """model directories, each DIR or NAME=DIR; by default the newest that training has left in ckpt/"""
    tasks: list[str | dict[str, Any]] = field(default_factory=list)
    """each NAME=PATH,key=value,…; by default those of the bundled sample"""
    out: str = "ckpt/evaluation"
    """where responses and the report go; what is there already is not asked again"""
    reward: str | None = None
    """directory of a reward model, for the task reward"""
    contamination: list[str] = field(default_factory=list)
    """training texts in which to look for the items: files or folders, or prepared data"""
    gram: int = 13
    """letters in a row that count as found there"""
    limit: int | None = None
    """items of each task, drawn with the seed; by default all"""
    seed: int = 0
    """of all draws"""
    template: str = "auto"
    """auto: the one stored beside the model, if any; or a name, or a .jinja file, where none is"""
    device: str | None = None
    """cuda, cuda:1 or cpu; by default each process's own GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU"""
    context: int | None = None
    """longest prompt with its answer; by default the model's"""
    max_rows: int = 64
    """answers that are written at once"""
    dry_run: bool = False
    """show each task's settings and one whole prompt, and ask nothing"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        for name, least in (("gram", 1), ("limit", 1), ("max_rows", 1), ("context", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name} is {value}. Use {least} or more.")

    def models(self) -> dict[str, str]:
        """The directories by their names in the report.

        Raises:
            InputError: two have one name; or none is given, and there is none.
        """
        found: dict[str, str] = {}
        for word in self.model or [newest_model()]:
            name, is_named, path = word.partition("=")
            if not is_named or Path(word).is_dir():
                name, path = Path(word).resolve().name, word
            if name in found:
                raise InputError(f"--model: {found[name]} and {path} are both called {name}. Write NAME={path}.")
            require_file_name(name, f"--model {word}")
            found[name] = path
        return found


def newest_model() -> str:
    """The model that training has left last. Raises InputError: there is none."""
    times = {
        path: Path(path, MODEL_COMPLETE).stat().st_mtime for path in TRAINED if Path(path, MODEL_COMPLETE).exists()
    }
    if not times:
        raise InputError(f"There is no finished model in {', '.join(TRAINED)}. Train one first, or give --model DIR.")
    return max(times, key=lambda path: times[path])


def require_file_name(name: str, where: str) -> None:
    """See that a name can be that of a folder. Raises InputError."""
    if not name or name.startswith(".") or any(not (one.isalnum() or one in "-_.+") for one in name):
        raise InputError(f"{where}: {name!r} is to name a folder. Use letters, digits, -, _ and + only.")
