"""Where a run's words and numbers go: config.yaml and metrics.jsonl always; the terminal, TensorBoard, wandb and
curves.png beside them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import changes, check_range, to_yaml
from engine.files import write_durably
from engine.launch import speak
from model.errors import InputError


@dataclass
class LogConfig:
    """What is reported, and how often."""

    every: int = 10
    """steps between lines of progress; metrics.jsonl holds every step"""
    tensorboard: bool = True
    """write TensorBoard events where tensorboard is installed"""
    curves: bool = True
    """redraw curves.png at every save, where matplotlib is installed"""
    wandb: str | None = None
    """project to log to; needs the wandb extra"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense, or wandb is asked for and not installed."""
        check_range("log", self, 1, "every")
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise InputError(
                "--log.wandb needs wandb, which is not installed. Install it with pip install -e '.[wandb]'."
            )


_CURVE_POINTS = 2000
PANELS = (("loss", "held_out_loss"), ("lr",), ("grad_norm",), ("tokens_per_second",))
"""What curves.png shows: the numbers of each panel, an even count of panels."""


class RunLog:
    """Rank 0's log of a run; on other ranks every call does nothing.

    Args:
        directory: the run directory; `config.yaml`, `metrics.jsonl`, `tensorboard/` and `curves.png` lie in it.
        steps_done: by the checkpoint this process starts from; later rows, of a run that was killed, are dropped.
        recipe: the resolved configuration, a dataclass; `config.yaml` keeps it.
        panels: what curves.png shows, as `PANELS`.
        is_over: no step is left to do.
    """

    def __init__(
        self,
        directory: Path,
        steps_done: int,
        config: LogConfig,
        recipe: Any,
        panels: Sequence[Sequence[str]] = PANELS,
        is_over: bool = False,
    ) -> None:
        self.is_active = int(os.environ.get("RANK", "0")) == 0
        self._events: Any = None
        self._wandb: Any = None
        if not self.is_active:
            return
        self._directory = directory
        self._draws, self._panels = config.curves, panels
        keep_recipe(directory, recipe, bool(steps_done), is_over)
        self._path = directory / "metrics.jsonl"
        drop_rows_after(self._path, steps_done)
        self._file = self._path.open("a", encoding="utf-8")
        self._has_live_line = False
        if config.tensorboard:
            self._events = _tensorboard(directory / "tensorboard", steps_done + 1)
        if config.wandb:
            self._wandb = _wandb(config.wandb, directory, dataclasses.asdict(recipe))

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl; numbers also go to TensorBoard and wandb."""
        if not self.is_active:
            return
        # JSON has no word for a number that is not finite.
        values = {name: None if is_broken(value) else value for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def progress(self, line: str) -> None:
        """A line that the next one replaces on a terminal; an ordinary line elsewhere."""
        if not self.is_active:
            return
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            self._has_live_line = True
        else:
            speak(line)

    def say(self, line: str) -> None:
        """A line that stays."""
        if not self.is_active:
            return
        if self._has_live_line:
            print(file=sys.stderr)
            self._has_live_line = False
        speak(line)

    def draw(self) -> None:
        """Renew curves.png from metrics.jsonl."""
        if self.is_active and self._draws:
            draw_curves(self._path, self._directory / "curves.png", self._panels)

    def close(self) -> None:
        """Flush and close everything."""
        if not self.is_active:
            return
        if self._has_live_line:
            print(file=sys.stderr)
            self._has_live_line = False
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def keep_recipe(directory: Path, recipe: Any, has_begun: bool, is_over: bool, longer: str = "--train.steps") -> None:
    """Write a run's recipe into its config.yaml, and say what has changed since the run began. What is over keeps the
    recipe that it was trained with; `longer`: the option that has it go on."""
    saved = directory / "config.yaml"
    if has_begun and saved.is_file():
        changed = changes(saved.read_text(encoding="utf-8"), recipe)
        if changed:
            speak(f"Changed since this run began: {', '.join(changed)}.")
        if changed and is_over:
            speak(
                "It was not trained with that. Use --resume never to begin anew, another --out for a new run, or raise "
                f"{longer} to go on."
            )
        if is_over:
            return
    write_durably(saved, to_yaml(recipe))


def is_broken(value: Any) -> bool:
    """Whether this is a number that is not finite."""
    return isinstance(value, float) and not math.isfinite(value)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def drop_rows_after(
    path: Path, steps_done: int, is_training: Callable[[dict[str, Any]], bool] = lambda row: "loss" in row
) -> None:
    """Keep what the checkpoint knows of; a resumed run writes the rest again, evaluations at that step included.

    Args:
        path: of JSON lines with a "step" each.
        is_training: whether a row is of the step itself, not of an evaluation after it.
    """
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] < steps_done + is_training(row)]
    beside = path.with_name(path.name + ".new")
    beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    beside.replace(path)


def _tensorboard(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        speak("TensorBoard is not installed; metrics.jsonl holds the same numbers. (pip install -e .[logs])")
        return None
    return SummaryWriter(str(directory), purge_step=first_step)


def _wandb(project: str, directory: Path, recipe: dict[str, Any]) -> Any:
    import wandb

    # The id follows the directory, so that a resumed run goes on in the same chart.
    identity = directory.resolve().as_posix().strip("/").replace("/", "-")[-100:]
    wandb.init(project=project, name=directory.name, id=identity, resume="allow", config=recipe, dir=str(directory))
    return wandb


def draw_curves(metrics: Path, picture: Path, panels: Sequence[Sequence[str]] = PANELS) -> None:
    """Panels of numbers against the step, in two rows; gradient norms on a logarithmic scale."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(metrics)
    # As many points as the picture can show: a long run must not draw for minutes.
    stride = -(-len(rows) // _CURVE_POINTS)
    rows = [row for index, row in enumerate(rows) if index % stride == 0 or "loss" not in row]
    columns = len(panels) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(5.5 * columns, 7), layout="constrained")
    for axis, names in zip(axes.flat, panels, strict=True):
        points = {name: [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in names}
        for name, found in points.items():
            if found:
                axis.plot(*zip(*found, strict=True), label=name, linewidth=1.2)
        # Zeros alone, as of answers that are all worth the same, have no place on a logarithmic scale.
        if names[0].endswith("grad_norm") and any(value > 0 for found in points.values() for _, value in found):
            axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(loc="upper right")
    beside = picture.with_name(".curves-new.png")
    figure.savefig(beside, dpi=110)
    pyplot.close(figure)
    beside.replace(picture)
