"""The figures of a chain, from what its stages have left, and whether they lie where they should."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MODELS = ("pretrain", "sft", "rejection", "ppo")
# Column of the table: task of the evaluation, and its metric.
COLUMNS = {
    "choice": ("choice", "accuracy"),
    "questions right": ("questions", "correct"),
    "true reward": ("questions", "true_reward"),
    "entity F1": ("entities", "micro_f1"),
    "dialogue ROUGE-L": ("dialogue", "rouge_l"),
    "dialogue BLEU-4": ("dialogue", "bleu_4"),
    "stigma": ("attitudes", "stigma"),
}


class Figure(NamedTuple):
    """A number with its 95 % interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


class Chain(NamedTuple):
    """Which figures there are. Names are of folders in ckpt/.

    losses: runs whose last held-out loss is one. judges: reward models.
    models: as the report names them, in its order. evaluation: where the report lies. bands: the file of its bands.
    """

    losses: tuple[str, ...]
    judges: tuple[str, ...]
    models: tuple[str, ...]
    evaluation: str
    bands: Path


FULL = Chain(("pretrain", "sft"), ("rm",), MODELS, "evaluation", Path(__file__).parent / "bands.yaml")
ADAPTERS = Chain(
    ("sft", "lora-sft"),
    ("rm", "lora-rm"),
    ("sft", "lora-sft", "rejection", "lora-rejection", "ppo", "lora-ppo", "dpo", "lora-dpo"),
    "lora-evaluation",
    Path(__file__).parent / "lora_bands.yaml",
)
"""Each stage with all weights, and with adapters of rank 8."""


def figures(root: Path, chain: Chain = FULL) -> dict[str, Figure]:
    """By name: `sft.loss` and others, held out, in nats a token; `rm.accuracy`; `<model>.<column>`."""
    found = {f"{name}.loss": Figure(_last_held_out(root / "ckpt" / name)) for name in chain.losses}
    for name in chain.judges:
        report = json.loads((root / "ckpt" / name / "report.json").read_text(encoding="utf-8"))
        found[f"{name}.accuracy"] = Figure(*report["accuracy"])
    sections = _evaluation(root, chain)
    for column, (task, metric) in COLUMNS.items():
        for entry in sections[task]["entries"]:
            one = next(one for one in entry["metrics"] if one["name"] == metric)
            found[f"{entry['model']}.{column}"] = Figure(one["value"], one["low"], one["high"])
    return found


def answers(root: Path, task: str = "qa", count: int = 5) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(question, the answer that is there, each model's answer) of questions spread over the task, the same for all."""
    said: dict[str, dict[str, Any]] = {}
    for model in MODELS:
        lines = (root / "ckpt" / "evaluation" / model / task / "predictions.jsonl").read_text(encoding="utf-8")
        said[model] = {one["id"]: one for one in map(json.loads, lines.splitlines())}
    ids = list(said[MODELS[-1]])
    for place in range(count):
        id = ids[place * len(ids) // count]
        last = said[MODELS[-1]][id]
        yield last["shown"], last["gold"], {model: said[model][id]["answer"] for model in MODELS}


def gains(root: Path, chain: Chain = FULL) -> dict[tuple[str, str, str], Figure]:
    """(worse, better, column) -> how far the second is above the first, item by item, with its 95 % interval."""
    found = {}
    sections = _evaluation(root, chain)
    for column, (task, metric) in COLUMNS.items():
        for one in sections[task]["comparisons"]:
            value, low, high = (one["difference"][name] for name in ("value", "low", "high"))
            if one["metric"] == metric:
                found[one["a"], one["b"], column] = Figure(-value, -high, -low)
                found[one["b"], one["a"], column] = Figure(value, low, high)
    return found


def out_of_place(
    found: Mapping[str, Figure], gained: Mapping[tuple[str, str, str], Figure], bands: Path = FULL.bands
) -> list[str]:
    """A sentence for every figure or difference that does not lie in its band, and every gain that is not surely one.

    A band's name is a figure's, or those of two with " - " between: how far the first lies above the second.
    """
    wanted = yaml.safe_load(bands.read_text(encoding="utf-8"))
    sentences = []
    for name, (low, high) in wanted["bands"].items():
        value = value_of(name, found)
        if not low <= value <= high:
            sentences.append(f"{name} is {value:.4g}; it should lie between {low} and {high}.")
    for worse, better, column in wanted["gains"]:
        gain = gained[worse, better, column]
        if gain.low is None or gain.low <= 0:
            span = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
            sentences.append(f"{column}: {better} is {span} from {worse}; it should surely be above it.")
    return sentences


def value_of(name: str, found: Mapping[str, Figure]) -> float:
    """Of a figure, or of "a - b" the difference."""
    first, *second = name.split(" - ")
    return found[first].value - sum(found[one].value for one in second)


def _last_held_out(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1]


def _evaluation(root: Path, chain: Chain) -> dict[str, Any]:
    report = json.loads((root / "ckpt" / chain.evaluation / "report.json").read_text(encoding="utf-8"))
    return {section["label"]: section for section in report["sections"]}
