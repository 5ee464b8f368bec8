"""Letters read off answers in words, case by case."""

from __future__ import annotations

import pytest

from evals.choice_answers import find_letters

OPTIONS = ("草绿色链球菌", "葡萄球菌", "肺炎球菌", "胰岛 B 细胞")

CASES = {
    "a letter alone": {"B": "B", " B \n": "B", "B.": "B", "b": "", "E": ""},
    "full width": {"Ａ": "A", "（Ｄ）": "D", "答案：ＡＢＤ": "ABD", "Ｂ．葡萄球菌": "B"},
    "brackets and marks": {"(D)": "D", "【答案】C": "C", "**B**": "B", "答案: [D]": "D", "“C”": "C"},
    "said to be the answer": {
        "答案是B。": "B",
        "正确答案为：C": "C",
        "答案应为：B": "B",
        "答案应该是A": "A",
        "答案 B": "B",
        "答案是选项B": "B",
        "答案是B选项": "B",
        "正确选项为 (C)": "C",
        "答案：a": "A",
        "综上，选A。": "A",
    },
    "chosen": {"选C": "C", "故选：C": "C", "我认为应该选择D选项": "D", "不能选A，应选B": "B"},
    "several": {
        "ABD": "ABD",
        "A和C": "AC",
        "A、B、D": "ABD",
        "D, B": "BD",
        "A C": "AC",
        "答案是A、C和D。": "ACD",
        "ABD三项": "ABD",
        "答案：A和C都正确": "AC",
        "A正确，B错误，D正确。": "AD",
    },
    "others are mentioned first": {
        "A是错误的，因为链球菌少见；B也不对；C正确。所以答案是C。": "C",
        "如果选A，则容易出血；但选B更安全。": "B",
        "A. 错误；B. 错误；C. 正确；D. 错误": "C",
        "正确答案不是A，而是B": "B",
        "B选项正确，A选项错误": "B",
        "先看答案是A的可能。后来发现不对，所以答案是D。": "D",
    },
    "others are mentioned behind": {"C\n解析：因为A、B都不对": "C", "D。因为其余都不对，例如A": "D", "B. 而不是A": "B"},
    "with its text": {"B. 葡萄球菌": "B", "A 草绿色链球菌": "A", "(D) 胰岛B细胞": "D", "B、葡萄球菌": "B"},
    "text alone": {"葡萄球菌": "B", "是肺炎球菌感染": "C", "应选用胰岛B细胞": "D", "葡萄球菌和肺炎球菌": ""},
    "letters that name nothing": {
        "首选ACE抑制剂": "",
        "答案是ACE抑制剂": "",
        "维生素B12缺乏": "",
        "复制DNA": "",
        "AB型血": "",
        "CT检查": "",
    },
    "several, of which none may be lost": {
        "答案：A、B、C、D都不对": "",
        "答案：A、B、C、D都不对，没有正确选项": "",
        "选A、B错误": "",
        "(A)和(B)都不对，选 (C)": "C",
        "A、B、C都不对，D正确。": "D",
        "A和B都不对": "",
    },
    "denied": {
        "不选 B": "",
        "不能选 A": "",
        "不应选A": "",
        "并非答案A": "",
        "没有选 A。": "",
        "错误的是A": "",
        "不正确的选项是 A": "",
        "错误答案是A": "",
        "排除 A": "",
        "不是A、B": "",
        "不选A、B，选 C": "C",
        "不是 A，是 B": "B",
        "其余都不对\nA": "A",
        "不是葡萄球菌": "",
        "排除葡萄球菌": "",
        "不考虑 葡萄球菌感染": "",
        "葡萄球菌不对": "",
        "不是葡萄球菌，是肺炎球菌": "C",
        "葡萄球菌？不，不是葡萄球菌": "",
        "草绿色链球菌不对\n葡萄球菌": "B",
        "非常符合葡萄球菌感染": "B",
    },
    "left open": {
        "答案A或B": "",
        "A或B": "",
        "A或者B。": "",
        "A、B或C正确": "",
        "选A或B，最后选C": "C",
        "答案是C。A或B也有可能": "C",
        "葡萄球菌或肺炎球菌": "",
    },
    "nothing": {"": "", "  \n": "", "作为AI，我无法回答这个问题。": "", "对不起，请咨询医生。": "", "不选A": ""},
}


@pytest.mark.parametrize("kind", CASES)
def test_letters_are_read_off_answers_as_a_reader_would(kind: str) -> None:
    assert {said: find_letters(said, OPTIONS) for said in CASES[kind]} == CASES[kind]


@pytest.mark.parametrize(
    ("said", "letters"),
    [
        ("错误的是A", "A"),
        ("不正确的说法是：B。因为其余都对", "B"),
        ("C选项错误。", "C"),
        ("D的说法是不正确的", "D"),
        ("A正确，B正确，C错误，D正确", "C"),
        ("答案：B", "B"),
        ("A、B都不对", ""),  # says of two that they are wrong, where one is asked for
        ("不选A", ""),
    ],
)
def test_where_the_wrong_one_is_asked_for_the_wrong_one_is_named(said: str, letters: str) -> None:
    assert find_letters(said, OPTIONS, "关于该病，下列说法错误的是（ ）。") == letters


def test_where_the_right_one_is_asked_for_the_wrong_one_is_not_it() -> None:
    question = "患者不能进食，其致病菌是（ ）。"
    assert find_letters("错误的是A", OPTIONS, question) == ""
    assert find_letters("A错误，B正确。", OPTIONS, question) == "B"


def test_only_letters_of_options_count() -> None:
    assert find_letters("E", (*OPTIONS, "以上都不是")) == "E"
    assert find_letters("答案是E", OPTIONS) == ""
    assert find_letters("ACE", (*OPTIONS, "以上都不是")) == "ACE"


def test_an_option_within_another_one_is_not_mentioned_by_it() -> None:
    assert find_letters("应为细菌性肺炎", ("肺炎", "细菌性肺炎", "肺炎球菌", "哮喘")) == "B"


def test_denying_a_longer_option_does_not_name_the_one_within_it() -> None:
    options = ("肺炎", "细菌性肺炎", "哮喘", "肺癌")
    assert find_letters("不是细菌性肺炎", options) == ""
    assert find_letters("不是细菌性肺炎，是肺炎", options) == "A"
    assert find_letters("不是肺炎，是细菌性肺炎", options) == "B"


def test_options_that_are_empty_or_hold_signs_of_patterns_are_texts() -> None:
    assert find_letters("应为 4 种 (a+b)", ("4 种 (a+b)", "", "5 种", "6 种")) == "A"
    assert find_letters("不知道", ("", "", "", "")) == ""
