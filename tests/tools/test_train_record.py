"""Records, targets and the page of the training benchmark, from figures that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.benchmark import Lap, useful_flops
from tools.train_cases import named, ways
from tools.train_data import Step
from tools.train_page import append, page
from tools.train_parts import PARTS, Parts
from tools.train_race import OURS, Outcome, Sizes
from tools.train_record import latest, record, verdicts

GIB = 1 << 30
SIZES = Sizes(warm=1, steps=2, laps=3, traced=0)
STEPS = [Step([99], 99, []), *[Step([4096] * 8, 1, [])] * 6]


def outcome(seconds: float, peak: int | None = 100 * GIB, busy: float = 0.9) -> Outcome:
    """Laps of two steps, of which the middle one takes so long; a tenth of a step in each of six parts."""
    laps = [Lap(2 * 32768, 2 * seconds * factor, 0.01) for factor in (1.5, 1.0, 0.5)]
    parts = Parts({part: 0.1 * seconds for part in PARTS}, busy * seconds, 0.03 * seconds, [("gemm", "products", 1.0)])
    return Outcome("packs", laps, peak, 0.001, parts)


def made(name: str, contender: str, result: Outcome, peak: float | None = 989e12) -> dict[str, Any]:
    case = named(name)
    plan = ways(case, 32768, "bf16", 200 * GIB).plans[0]
    facts = {"device": "NVIDIA H200", "date": "2026-11-21", "commit": "abc", "precision": "bf16", "note": ""}
    return facts | record(case, contender, result, STEPS, SIZES, plan, peak)


def test_a_record_holds_the_median_lap_and_its_utilisation() -> None:
    one = made("7b-4096-full", OURS, outcome(3.0))
    assert one["tokens_per_second"] == pytest.approx(32768 / 3)
    assert one["seconds_per_step"] == pytest.approx(3.0)
    # The step before the clock ran is left out.
    flops = useful_flops(named("7b-4096-full").model, [4096] * 8)
    assert one["mfu"] == pytest.approx(flops / 3.0 / 989e12)
    assert one["launch_gaps"] == pytest.approx(0.1) and one["step_gap"] == pytest.approx(0.03)
    assert one["shares"][PARTS[0]] == pytest.approx(0.1)
    assert one["planned_bytes"] > 100 * GIB and made("7b-4096-full", "plain", outcome(3.0))["planned_bytes"] is None
    assert json.loads(json.dumps(one)) is not None


def test_on_a_processor_there_is_no_utilisation_and_shares_are_of_the_operators() -> None:
    one = made("small-256-full", OURS, outcome(3.0, peak=None, busy=0.6), peak=None)
    assert one["mfu"] is None and one["launch_gaps"] is None
    assert sum(one["shares"].values()) == pytest.approx(1.0)


def told(*records: dict[str, Any]) -> dict[tuple[str, str], tuple[str, str]]:
    return {(one.case, one.target): (one.found, one.text) for one in verdicts(records)}


def test_targets_are_met_or_missed_by_what_was_measured() -> None:
    found = told(
        made("7b-4096-full", OURS, outcome(3.0)),
        made("7b-4096-full", "liger", outcome(4.2, 90 * GIB)),
        made("7b-4096-full", "plain", outcome(3.2)),
        made("7b-4096-sft", OURS, outcome(3.1)),
        made("1b-4096-full", OURS, outcome(0.4)),
        made("1b-4096-full", "liger", outcome(0.5, 100 * GIB)),
    )
    assert found["7b-4096-full", "MFU at least 50%"] == ("47.5%", "missed")
    assert found["1b-4096-full", "MFU at least 50%"][1] == "met"
    assert found["7b-4096-full", "at least 1.3 × transformers, Liger"] == ("1.40 ×", "met")
    assert found["1b-4096-full", "at least 1.3 × transformers, Liger"] == ("1.25 ×", "missed")
    assert found["7b-4096-full", "no more memory than Liger"] == ("1.11 ×", "missed")
    assert found["1b-4096-full", "no more memory than Liger"] == ("1.00 ×", "met")
    assert found["7b-4096-full", "at least 1.1 × plain decoder"] == ("1.07 ×", "missed")
    assert found["7b-4096-sft", "at least 95% of the tokens/s of full-length documents"] == ("96.8%", "met")
    assert found["7b-4096-full", "gaps between steps below 2%"] == ("3.00%", "missed")


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    found = told(made("7b-4096-sft", OURS, outcome(3.1)), made("7b-4096-sft", "liger", Outcome(failure="does not fit")))
    assert found["7b-4096-sft", "at least 95% of the tokens/s of full-length documents"] == ("", "not measured")
    assert found["7b-4096-sft", "at least 1.3 × transformers, Liger"] == ("", "not measured")
    assert not any(target.startswith("MFU") for _, target in found)


def test_fp8_is_judged_against_bf16_of_the_same_case() -> None:
    found = told(made("7b-4096-full", OURS, outcome(3.0)), made("7b-4096-full", "ours+fp8", outcome(2.0)))
    assert found["7b-4096-full", "FP8 at least 1.25 × bf16"] == ("1.50 ×", "met")


def test_the_last_record_of_a_key_counts_where_the_first_one_stood() -> None:
    rows = [{"k": "a", "v": 1}, {"k": "b", "v": 2}, {"k": "a", "v": 3}]
    assert latest(rows, lambda row: row["k"]) == [{"k": "a", "v": 3}, {"k": "b", "v": 2}]


def test_the_page_has_targets_speeds_and_parts_and_says_who_failed(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "train-h200"
    append([made("7b-4096-full", OURS, outcome(9.0))], out, "python x.py")
    append([made("7b-4096-full", OURS, outcome(3.0))], out, "python x.py")
    peers = [made("7b-4096-full", "liger", outcome(4.5)), made("7b-4096-full", "plain", Outcome(failure="too large"))]
    append(peers, out, "python x.py")
    assert len((tmp_path / "deep" / "train-h200.jsonl").read_text().splitlines()) == 4
    text = (tmp_path / "deep" / "train-h200.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in rows}) == 3  # three tables, whose rows are all of one length
    speeds = {row[2]: row for row in rows if len(row) == 12}
    assert speeds["ours"][3:7] == ["10,923", "", "47.5%", "100.0"]
    assert float(speeds["ours"][7]) > 100
    assert speeds["transformers, Liger"][3:5] == ["7,282", "1.50"]
    assert speeds["plain decoder"][3] == "too large"
    parts = {row[1]: row for row in rows if len(row) == 5 + len(PARTS)}
    assert parts["ours"][2] == "3,000" and parts["ours"][-2:] == ["10.0%", "3.00%"]
    assert ["7b-4096-full", "at least 1.3 × transformers, Liger", "1.50 ×", "met"] in rows
    assert (tmp_path / "deep" / "train-h200.png").read_bytes()[:4] == b"\x89PNG"


def test_who_failed_after_some_laps_has_their_speed_and_its_failure_told() -> None:
    result = outcome(3.0)
    result.laps, result.parts, result.peak = result.laps[:2], None, None
    result.failure = "out of memory (after 2 laps)"
    one = made("7b-4096-sft", "plain", result)
    assert one["tokens_per_second"] and one["failure"] == result.failure
    # Of the steps that were taken.
    ragged = [Step([size], 1, []) for size in (99, 10, 20, 30, 40, 50, 60)]
    case = named("7b-4096-sft")
    plan = ways(case, 32768, "bf16", 200 * GIB).plans[0]
    assert record(case, "plain", result, ragged, SIZES, plan, None)["tokens_per_step"] == (10 + 20 + 30 + 40) / 4
    text = page([made("7b-4096-sft", OURS, outcome(3.0)), one], "python x.py")
    row = next(line for line in text.splitlines() if "| plain decoder |" in line)
    assert "| packs; out of memory (after 2 laps) |" in row and "10,923" not in row and " tok" not in row


def test_targets_are_for_gpus() -> None:
    one = made("small-256-sft", OURS, outcome(3.0, peak=None), peak=None) | {"device": "a processor"}
    text = page([one], "python x.py")
    assert "Targets" not in text and "in turn" in text
