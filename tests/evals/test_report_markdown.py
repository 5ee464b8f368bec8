"""Report in Markdown: whatever is in its cells, rows keep their columns and nothing is markup."""

from __future__ import annotations

import re

import pytest

from evals.published import read_published
from evals.report_facts import gather
from evals.report_markdown import escape, render, summary
from tests.evals.fake_evaluations import TASKS, evaluation
from tests.evals.test_report_html import nasty_everywhere


def tables(text: str) -> list[list[str]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [block for block in blocks if block[0].startswith("|")]


def columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize("model", ["ordinary", "nasty"])
def test_rows_have_the_columns_of_their_head(model: str) -> None:
    one = nasty_everywhere() if model == "nasty" else evaluation("sft", 0.4, 1, leaked=3)
    found = tables(render(gather([one, evaluation("ppo", 0.6, 2)]), read_published()))
    assert len(found) > 10
    for table in found:
        assert re.fullmatch(r"\|( -+:? \|)+", table[1])
        assert len({columns(line) for line in table}) == 1, table[0]


def test_nothing_that_is_named_acts() -> None:
    text = render(gather([nasty_everywhere()]), read_published())
    assert not re.search(r"(?<!\\)[<>]", text)
    assert not re.search(r"(?<!\\)`", text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", text)
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", text)
    assert links == [read_published().url, read_published().paper]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a|b", r"a\|b"),
        ("two\nlines", "two lines"),
        ("# no heading", r"\# no heading"),
        ("- no list", r"\- no list"),
        ("C-Eval (val)", "C-Eval (val)"),
        ("back\\slash", r"back\\slash"),
        ("micro_f1 *x* `y` <b> &lt; ~z~ [l](u)", r"micro\_f1 \*x\* \`y\` \<b\> \&lt; \~z\~ \[l\](u)"),
        ("血压：120/80", "血压：120/80"),
    ],
)
def test_text_stands_for_itself(text: str, written: str) -> None:
    assert escape(text) == written


def test_summary_alone_is_a_table_with_a_row_a_task() -> None:
    one = gather([evaluation("sft", 0.4, 1)])
    lines = summary(one).split("\n")
    assert [line.split(" | ")[0] for line in lines[2 : 2 + len(TASKS)]] == [f"| {label}" for label in TASKS]
    assert "Bold" not in summary(one)
    two = gather([evaluation("sft", 0.4, 1), evaluation("ppo", 0.7, 2)])
    bold = [line for line in summary(two).split("\n") if "**" in line]
    assert len(bold) == sum(section.leader is not None for section in two.sections) > 0
