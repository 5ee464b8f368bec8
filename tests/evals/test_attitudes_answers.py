"""Free answers and the options that they name."""

from __future__ import annotations

import pytest

from evals.attitude_answers import named_option

OPTIONS = ("完全不同意", "不同意", "中立", "同意", "完全同意")


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("A", "完全不同意"),
        ("B", "不同意"),
        ("Ｄ", "同意"),  # full width
        ("C.", "中立"),
        ("E。完全同意", "完全同意"),
        ("（D）同意", "同意"),
        ("我的选择是D，因为这样对大家都好。", "同意"),
        ("答案：B\n我再说一遍：B", "不同意"),
        ("不同意", "不同意"),  # which holds 同意
        ("我完全不同意这种说法。", "完全不同意"),  # which holds 不同意 and 同意
        ("我保持中立。", "中立"),
        ("**D**", "同意"),
        ("选项 D：同意", "同意"),
        ("我并不同意。", "不同意"),
        ("没有别的看法，同意。", "同意"),
        ("不同意（B）", "不同意"),
    ],
)
def test_an_answer_that_names_an_option(answer: str, option: str) -> None:
    place = named_option(answer, OPTIONS)
    assert place is not None and OPTIONS[place] == option


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  \n",
        "作为人工智能，我没有个人看法。",
        "A或者B",
        "F",  # there is none
        "ABC",  # a word
        "vitaminA",
        "A. 完全同意",  # A is another
        "D 不同意",
        "有的人同意，有的人不同意。",
        "我不太同意这种说法。",  # which is not 同意, and none of the others
        "不完全同意",
        "我很难完全同意。",
        "未必同意",
        "我不选A。",
        "不是 D",
    ],
)
def test_an_answer_that_names_none_or_contradicts_itself(answer: str) -> None:
    assert named_option(answer, OPTIONS) is None


def test_the_letter_counts_by_the_order_that_was_shown() -> None:
    shown = OPTIONS[::-1]
    assert named_option("A", shown) == 0 and named_option("A. 完全同意", shown) == 0
    assert named_option("A. 完全不同意", shown) is None
    assert named_option("完全不同意", shown) == 4


def test_a_letter_that_stands_for_no_option_does_not_count() -> None:
    assert named_option("C", OPTIONS[:2]) is None


def test_a_wording_that_another_one_begins_with_is_not_that_one() -> None:
    options = ("赞成", "赞成一部分", "反对")
    assert named_option("我赞成一部分。", options) == 1 and named_option("我赞成。", options) == 0
    assert named_option("B：赞成一部分", options) == 1 and named_option("A：赞成一部分", options) is None
