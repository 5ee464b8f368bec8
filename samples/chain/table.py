"""The table at the end: a row a model, a column a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from samples.chain.figures import COLUMNS, MODELS, Figure, value_of
from samples.chain.stages import MEMORY_GB, Done, Stage

_PERCENT = {"choice", "questions right", "entity F1", "dialogue ROUGE-L", "dialogue BLEU-4"}


def rows(found: Mapping[str, Figure], models: Sequence[str] = MODELS) -> list[list[str]]:
    """A heading, and a row of cells for each model."""
    table = [["", "held-out loss", *(f"{name}, %" if name in _PERCENT else name for name in COLUMNS)]]
    for model in models:
        loss = found.get(f"{model}.loss")
        cells = [f"{loss.value:.3f}" if loss else "–"]
        cells += [cell(found[f"{model}.{column}"], column in _PERCENT) for column in COLUMNS]
        table.append([model, *cells])
    return table


def cell(figure: Figure, is_share: bool) -> str:
    """A value with its interval; shares in per cent."""
    scale, digits = (100, 1) if is_share else (1, 3)
    text = f"{scale * figure.value:.{digits}f}"
    if figure.low is None or figure.high is None:
        return text
    return f"{text} [{scale * figure.low:.{digits}f}, {scale * figure.high:.{digits}f}]"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with columns of one width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]


def beside(bands: Path, found: Mapping[str, Figure], gained: Mapping[tuple[str, str, str], Figure]) -> list[list[str]]:
    """A heading, and a row for each band: both sides' figures, how far they lie apart, and how far they may."""
    table = [["", "all weights", "adapters", "apart", "band"]]
    for name, (low, high) in yaml.safe_load(bands.read_text(encoding="utf-8"))["bands"].items():
        adapted, full = name.split(" - ")
        (one, column), (other, _) = adapted.split("."), full.split(".")
        apart = gained.get((other, one, column), Figure(value_of(name, found)))
        span = "" if apart.low is None or apart.high is None else f" [{apart.low:+.3f}, {apart.high:+.3f}]"
        values = (f"{found[side].value:.3f}" for side in (full, adapted))
        table.append([full, *values, f"{apart.value:+.3f}{span}", f"{low:g} to {high:g}"])
    return table


def times(stages: Sequence[Stage], done: Sequence[Done]) -> list[str]:
    """What each stage took, beside its budget, and the most memory that one took."""
    by_name = {entry.name: entry for entry in done}
    taken = [(stage, by_name[stage.name]) for stage in stages]
    parts = [f"{stage.name} {entry.seconds:.0f}" for stage, entry in taken]
    total, budget = sum(entry.seconds for _, entry in taken), sum(stage.budget for stage in stages)
    lines = [f"Seconds: {', '.join(parts)}; {total:.0f} in all, of {budget} on two quiet cores."]
    late = [f"{stage.name} ({stage.budget})" for stage, entry in taken if entry.seconds > stage.budget]
    if late:
        lines.append(f"Over its budget: {', '.join(late)}. Was the machine doing something else?")
    hungry = max(done, key=lambda entry: entry.gigabytes)
    lines.append(f"Memory: at most {hungry.gigabytes:.1f} GB, in {hungry.name}; {MEMORY_GB:.0f} GB are its limit.")
    return lines
