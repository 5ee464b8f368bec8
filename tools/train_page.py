"""The records of the training benchmark as a page with its tables, and as a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.train_parts import PARTS
from tools.train_race import OURS
from tools.train_record import PEERS, Record, latest, verdicts

GIB = 1 << 30

_TOLD = """\
Speeds are of real tokens: padding does not count. Cases are named shape-context-kind. `full` is pre-training on
documents as long as the context, `ragged` on lognormal lengths with a median of an eighth of it; `sft` is
conversations, `reward` pairs of answers, of ragged lengths too (`tools/train_data.py`). All contenders take the same
documents in the same optimizer steps, with AdamW, clipping and fp32 masters; on a GPU the rest is bf16. Ours reads
packs from its loader. The others find their batches on the device; in pre-training they read rows of full length,
without padding, in which attention reaches over the ends of documents, elsewhere right-padded rows sorted by length.
They take the batch size at which they are fastest, and checkpoint blocks only where nothing fits without. Ours takes,
of what the memory plan lets fit, the recomputation and the packs that arithmetic (`engine/step_seconds.py`) says are
fastest; on a CPU no recomputation, and two packs a step.

MFU counts 6 N operations a real token, N being all matrices but the input embedding, and causal attention over the real
documents, forward and backward; nothing recomputed, and nothing that padding costs; over the data sheet's dense bf16
peak (989 TFLOP/s on H100 and H200). Memory is the most that was allocated, beside the plan's peak. The parts are shares
of a step: a GPU's kernels, and as launch gaps what is left of a step that was not traced; a CPU's operators by their
own time. `step gap` is the time from the last kernel of a step to the first of the next, under the profiler, which
makes it longer."""
_ALONE = "On this GPU each contender had the device to itself, one after another, ours first and once more at the end."
_IN_TURN = "On this CPU the contenders took their laps in turn, and the plain decoder was not compiled."

_COLUMNS = (
    "case", "layers", "contender", "tok/s", "ours over it", "MFU", "memory, GiB", "planned", "padding", "data wait",
    "how it ran", "commit",
)  # fmt: skip


def append(records: Sequence[Record], out: Path, command: str) -> None:
    """Add records to `out`.jsonl, and write the page and the plot of all that are there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.with_name(out.name + ".jsonl")
    with open(lines, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write([json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()], out, command)


def write(records: Sequence[Record], out: Path, command: str) -> None:
    """The page and the plot, each whole or the one before."""
    draft = out.with_name(f".{out.name}.md")
    draft.write_text(page(records, command), encoding="utf-8")
    os.replace(draft, out.with_name(out.name + ".md"))
    plot(records, out.with_name(out.name + ".png"))


def page(records: Sequence[Record], command: str) -> str:
    """What was measured and how, then the tables."""
    last = "Every lap, the largest kernels and all options are in the .jsonl file beside this page."
    return "\n\n".join(["# Training throughput", f"    {command}", _TOLD, tables(records), last]) + "\n"


def tables(records: Sequence[Record]) -> str:
    """For each device the targets, where it is a GPU, and tables of speeds and of parts."""
    current = _current(records)
    text: list[str] = []
    for device in dict.fromkeys(one["device"] for one in current):
        of_device = [one for one in current if one["device"] == device]
        is_on_gpu = any(one.get("peak_bytes") for one in of_device)
        text += [f"## {device}", _ALONE if is_on_gpu else _IN_TURN, *_facts(of_device)]
        if is_on_gpu:
            told = [(one.case, one.target, one.found, one.text) for one in verdicts(of_device)]
            text += ["Targets, set for one H200:", table(("case", "target", "found", "verdict"), told)]
        text += [table(_COLUMNS, [_speeds(one, of_device) for one in of_device])]
        traced = [one for one in of_device if one.get("shares")]
        head = ("case", "contender", "ms a step", *PARTS, "launch gaps", "step gap")
        text += [table(head, [_parts(one) for one in traced])] if traced else []
    return "\n\n".join(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _current(records: Sequence[Record]) -> list[Record]:
    """The last of each contender in each case on each device, those of a case together."""
    kept = latest(records, lambda one: (one["device"], one["case"], one["contender"]))
    cases = list(dict.fromkeys((one["device"], one["case"]) for one in kept))
    return sorted(kept, key=lambda one: cases.index((one["device"], one["case"])))


def _facts(records: Sequence[Record]) -> list[str]:
    """What the figures depend on, where it is the same for all; and remarks."""
    names = ("date", "threads", "torch", "triton", "transformers", "liger", "driver", "precision")
    told = [f"{name} {', '.join(map(str, values))}" for name in names if (values := _values(records, name))]
    notes = [str(note) for note in _values(records, "note")]
    return ["; ".join(told) + ".", *(f"Note: {note}." for note in notes)]


def _values(records: Sequence[Record], name: str) -> list[Any]:
    return [value for value in dict.fromkeys(one.get(name) for one in records) if value]


def _speeds(one: Record, others: Sequence[Record]) -> tuple[str, ...]:
    first = (one["case"], str(one["layers"]), _name(one))
    if not one.get("tokens_per_second"):
        return (*first, one["failure"], *[""] * (len(_COLUMNS) - 5), one["commit"])
    ours = next(
        (x.get("tokens_per_second") for x in others if (x["case"], x["contender"]) == (one["case"], OURS)), None
    )
    is_other = one["contender"] != OURS and ours
    return (
        *first,
        f"{one['tokens_per_second']:,.0f}",
        f"{ours / one['tokens_per_second']:.2f}" if is_other else "",
        _percent(one.get("mfu"), 1),
        _gib(one.get("peak_bytes")),
        _gib(one.get("planned_bytes")) if one.get("peak_bytes") else "",
        _percent(one.get("padding"), 1),
        _percent(one.get("data_wait"), 2),
        "; ".join(filter(None, (one["settings"], one["failure"]))),
        one["commit"],
    )


def _parts(one: Record) -> tuple[str, ...]:
    return (
        one["case"],
        _name(one),
        f"{1000 * one['seconds_per_step']:,.0f}",
        *(_percent(one["shares"][part], 1) for part in PARTS),
        _percent(one.get("launch_gaps"), 1),
        _percent(one.get("step_gap"), 2),
    )


def _name(one: Record) -> str:
    name: str = one["contender"]
    return PEERS.get(name, name)


def _percent(share: float | None, places: int) -> str:
    return "" if share is None else f"{share:.{places}%}"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.1f}"


def plot(records: Sequence[Record], path: Path) -> None:
    """Tokens a second of every contender beside ours, case by case, and what our steps consist of. Nothing without
    matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    measured = [one for one in _current(records) if one.get("tokens_per_second")]
    device = measured[-1]["device"] if measured else ""
    measured = [one for one in measured if one["device"] == device]
    ours = {one["case"]: one for one in measured if one["contender"] == OURS}
    if not ours:
        return
    cases = list(ours)
    names = [name for name in dict.fromkeys(one["contender"] for one in measured)]
    figure = Figure(figsize=(12, 1.6 + 0.5 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    speeds, shares = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        found = {one["case"]: one["tokens_per_second"] for one in measured if one["contender"] == name}
        places = [place + (index - (len(names) - 1) / 2) * height for place in range(len(cases))]
        values = [found.get(case, 0.0) / ours[case]["tokens_per_second"] for case in cases]
        speeds.barh(places, values, height, label=PEERS.get(name, name))
    speeds.set_yticks(range(len(cases)), cases, fontsize=7)
    speeds.invert_yaxis()
    speeds.set_xlabel("tokens a second, over ours")
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 4, "fontsize": 7, "frameon": False}
    speeds.legend(**above)
    left = [0.0] * len(cases)
    for part in (*PARTS, "launch gaps"):
        values = [_share(ours[case], part) for case in cases]
        shares.barh(range(len(cases)), values, 0.6, left=left, label=part)
        left = [begin + value for begin, value in zip(left, values, strict=True)]
    shares.set_xlabel("share of our step")
    shares.legend(**above)
    figure.suptitle(f"{device}, {ours[cases[-1]]['date']}", fontsize=9)
    figure.savefig(path, dpi=120)


def _share(one: Record, part: str) -> float:
    return (one.get("launch_gaps") if part == "launch gaps" else one.get("shares", {}).get(part)) or 0.0
