"""Adapters beside full training: the bands hold what was measured, and nothing else gets through."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from samples.chain.figures import ADAPTERS, COLUMNS, Figure, figures, gains, out_of_place, value_of
from samples.chain.table import beside

ROOT = Path(__file__).resolve().parents[2]
BANDS = yaml.safe_load(ADAPTERS.bands.read_text(encoding="utf-8"))


def measured() -> dict[str, float]:
    """Both sides of every band, as docs/lora.md has them: `rm.accuracy`, `lora-rm.accuracy` and so on."""
    page = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\w\s-]+?) \| ([\d.]+)[^|]* \| ([\d.]+)[^|]* \|", page, re.MULTILINE)
    return {
        f"{side}{stage}.{column}": float(value)
        for stage, column, *values in rows
        for side, value in zip(("", "lora-"), values, strict=True)
    }


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a chain would leave that comes to the measured figures; differences in evaluations are sure from 0.01 on."""
    values = measured()
    for run in ("sft", "lora-sft", "rm", "lora-rm", ADAPTERS.evaluation):
        (tmp_path / "ckpt" / run).mkdir(parents=True)
    for run in ADAPTERS.losses:
        row = {"step": 9, "held_out_loss": values[f"{run}.loss"]}
        (tmp_path / "ckpt" / run / "metrics.jsonl").write_text(json.dumps(row))
    for run in ADAPTERS.judges:
        accuracy = [values[f"{run}.accuracy"], 0.0, 1.0]
        (tmp_path / "ckpt" / run / "report.json").write_text(json.dumps({"accuracy": accuracy}))
    sections: dict[str, dict[str, list[dict[str, object]]]] = {}
    for column, (task, metric) in COLUMNS.items():
        section = sections.setdefault(task, {"entries": [], "comparisons": []})
        section["entries"] = section["entries"] or [{"model": model, "metrics": []} for model in ADAPTERS.models]
        known = {model: values.get(f"{model}.{column}", 0.5) for model in ADAPTERS.models}
        for entry in section["entries"]:
            value = known[str(entry["model"])]
            entry["metrics"].append({"name": metric, "value": value, "low": value, "high": value})  # type: ignore[attr-defined]
        for a, b in itertools.combinations(ADAPTERS.models, 2):
            apart = known[a] - known[b]
            difference = {"value": apart, "low": apart - 0.01, "high": apart + 0.01}
            section["comparisons"].append({"metric": metric, "a": a, "b": b, "difference": difference})
    report = {"sections": [{"label": task, **section} for task, section in sections.items()]}
    (tmp_path / "ckpt" / ADAPTERS.evaluation / "report.json").write_text(json.dumps(report))
    return tmp_path


def test_what_was_measured_lies_in_its_bands(left: Path) -> None:
    assert out_of_place(figures(left, ADAPTERS), gains(left, ADAPTERS), ADAPTERS.bands) == []


@pytest.mark.parametrize("name", BANDS["bands"])
def test_a_stage_that_lands_elsewhere_is_named(left: Path, name: str) -> None:
    found, (low, high) = figures(left, ADAPTERS), BANDS["bands"][name]
    adapted, full = name.split(" - ")
    for outside in (low - 0.001, high + 0.001):
        moved = {**found, adapted: Figure(found[full].value + outside)}
        (sentence,) = out_of_place(moved, gains(left, ADAPTERS), ADAPTERS.bands)
        assert sentence.startswith(f"{name} is {value_of(name, moved):.4g}; it should lie between")


@pytest.mark.parametrize("who", [tuple(gain) for gain in BANDS["gains"]], ids=" ".join)
def test_a_stage_that_brings_nothing_is_named(left: Path, who: tuple[str, str, str]) -> None:
    gained = {**gains(left, ADAPTERS), who: Figure(0.02, -0.01, 0.05)}
    (sentence,) = out_of_place(figures(left, ADAPTERS), gained, ADAPTERS.bands)
    assert sentence.startswith(f"{who[2]}: {who[1]} is +0.020")


def test_a_band_is_of_a_stage_with_adapters_beside_the_same_with_all_weights(left: Path) -> None:
    pairs = [name.split(" - ") for name in BANDS["bands"]]
    assert [adapted for adapted, _ in pairs] == [f"lora-{full}" for _, full in pairs]
    assert {full.split(".")[0] for _, full in pairs} == {"sft", "rm", "rejection", "ppo", "dpo"}
    assert all(worse == "sft" and better.startswith("lora-") for worse, better, _ in BANDS["gains"])


def test_the_table_shows_each_band_with_both_sides_and_how_far_they_lie_apart(left: Path) -> None:
    found = figures(left, ADAPTERS)
    _, *rows = beside(ADAPTERS.bands, found, gains(left, ADAPTERS))
    for row, (name, (low, high)) in zip(rows, BANDS["bands"].items(), strict=True):
        adapted, full = name.split(" - ")
        assert row[:3] == [full, f"{found[full].value:.3f}", f"{found[adapted].value:.3f}"]
        assert row[3].startswith(f"{value_of(name, found):+.3f}") and row[4] == f"{low:g} to {high:g}"


def test_the_page_states_the_bands_that_are_checked() -> None:
    page = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    for name, (low, high) in BANDS["bands"].items():
        stage, column = name.split(" - ")[1].split(".")
        (row,) = re.findall(rf"^\| `{stage}` \| {re.escape(column)} \|.*$", page, re.MULTILINE)
        assert row.endswith(f"| {low:g} to {high:g} |".replace("-", "−"))
