"""How numbers and texts are written."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evals.plots import Point, scale_of
from evals.report_format import bounds, heading, mark, number, probability, signed, ticks, title, visible
from evals.task import Metric


@pytest.mark.parametrize(
    ("value", "unit", "written"),
    [
        (28 / 41, "%", "68.29"),
        (1.0, "%", "100.00"),
        (-0.00001, "%", "0.00"),
        (-0.0512, "%", "−5.12"),
        (2.34567, "nats", "2.346"),
        (98.76, "points", "98.8"),
        (17.25, "tokens", "17.2"),
        (0.9876, "", "0.988"),
        (54321.9, "", "54,322"),
        (1234.5, "", "1,234.500"),
        (math.nan, "%", "—"),
        (math.inf, "", "—"),
        (None, "%", "—"),
    ],
)
def test_number(value: float | None, unit: str, written: str) -> None:
    assert number(value, unit) == written


@pytest.mark.parametrize(
    ("value", "unit", "written"),
    [
        (0.0123, "%", "+1.23"),
        (-0.0123, "%", "−1.23"),
        (0.0, "%", "0.00"),
        (1e-9, "%", "0.00"),
        (0.2, "score", "+0.200"),
    ],
)
def test_difference(value: float, unit: str, written: str) -> None:
    assert signed(value, unit) == written


@pytest.mark.parametrize(
    ("low", "high", "unit", "written"),
    [
        (0.52951, 0.8041, "%", "[53.0, 80.4]"),
        (-0.02, 0.01, "%", "[−2.0, 1.0]"),
        (1.5, 2.5, "nats", "[1.500, 2.500]"),
        (None, None, "%", ""),
        (0.1, None, "%", ""),
        (math.nan, math.nan, "%", ""),
    ],
)
def test_interval(low: float | None, high: float | None, unit: str, written: str) -> None:
    assert bounds(low, high, unit) == written


@pytest.mark.parametrize(
    ("p", "written"),
    [(0.0000999, "< 0.001"), (0.0123, "0.012"), (0.0994, "0.099"), (0.25, "0.25"), (1.0, "1.00"), (math.nan, "—")],
)
def test_p(p: float, written: str) -> None:
    assert probability(p) == written


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("accuracy", "Accuracy"),
        ("micro_f1", "Micro F1"),
        ("bleu_4", "BLEU-4"),
        ("paper_rouge_l", "Paper ROUGE-L"),
        ("subject_mean", "Subject mean"),
        ("letter_A", "Letter A"),
    ],
)
def test_name_of_a_metric(name: str, written: str) -> None:
    assert title(name) == written


def test_heading_says_unit_and_direction() -> None:
    assert heading(Metric("accuracy", 0.5)) == "Accuracy (%) ↑"
    assert heading(Metric("perplexity", 5.0, unit="", better="lower")) == "Perplexity ↓"
    assert heading(Metric("nats_per_token", 5.0, unit="nats", better="lower")) == "Nats per token ↓"
    assert heading(Metric("length_ratio", 1.0, unit="", better=None)) == "Length ratio"


@given(st.text())
def test_visible_text_holds_nothing_that_acts(text: str) -> None:
    shown = visible(text)
    assert all(letter in "\n\t" or letter.isprintable() or letter.isspace() for letter in shown)
    assert not set(shown) & {chr(code) for code in (*range(9), 11, 12, 13, *range(14, 32), 127, 0x202E, 0x2066)}
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


def test_visible_text_keeps_spaces_of_chinese_and_line_ends() -> None:
    assert visible("　头晕\n三天\t余") == "　头晕\n三天\t余"
    assert visible("\x1b[2J\r\u2028\ufeff") == "⟨U+001B⟩[2J⟨U+000D⟩⟨U+2028⟩⟨U+FEFF⟩"


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
@example(5e-324, 0.0)
def test_ticks_are_few_round_and_span_the_values(low: float, width: float) -> None:
    if 0 < width < 1e-6 * max(1.0, abs(low)):
        return  # closer together than a float can be drawn
    marks = ticks(low, low + width)
    slack = 1e-6 * (marks[1] - marks[0])
    assert marks[0] <= low + slack and marks[-1] >= low + width - slack
    assert 2 <= len(marks) <= 6
    step = marks[1] - marks[0]
    assert f"{step:.0e}"[0] in "125"


def test_scale_of_shares_ends_at_none_and_all() -> None:
    scale = scale_of([Point(0, 0.99, 0.9, 1.0), Point(1, 0.05, 0.0, 0.12)], (0.25,), (0.0, 1.0))
    assert (scale.marks[0], scale.marks[-1]) == (0.0, pytest.approx(1.0))
    assert [mark(each, "%") for each in scale.marks] == ["0", "20", "40", "60", "80", "100"]
    assert scale.place(0.25) == pytest.approx(25.0)


def test_scale_of_nothing_is_still_one() -> None:
    assert scale_of([Point(0, math.nan)], (), (0.0, 1.0)).marks == (0.0, 1.0)
    assert len(scale_of([Point(0, 3.0)]).marks) >= 2
