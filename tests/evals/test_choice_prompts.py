"""Prompts of the protocols, written out, and what becomes of those that are too long."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from evals.choice_files import Question
from evals.choice_prompts import PROTOCOLS, Writer
from evals.task import Prompt
from model.chat import Message

ASKED = Question("q", "甲？ ", ("一", "二", "三", "四"), "B", "anatomy", "解剖学")
SHOWN = Question("e", "乙？", ("五", "六", "七", "八"), "D", "anatomy", "解剖学")


def prompt_of(
    protocol: str, exemplars: Sequence[Question] = (), is_chat: bool = False, dataset: str = "cmmlu"
) -> Prompt:
    return Writer(PROTOCOLS[protocol], dataset, is_chat).ask(ASKED, exemplars).prompt


def test_ceval_names_the_subject_of_an_examination() -> None:
    assert prompt_of("ceval", [SHOWN], dataset="ceval") == (
        "以下是中国关于解剖学考试的单项选择题，请选出其中的正确答案。\n\n"
        "乙？\nA. 五\nB. 六\nC. 七\nD. 八\n答案：D\n\n"
        "甲？ \nA. 一\nB. 二\nC. 三\nD. 四\n答案："
    )


def test_ceval_in_chat_makes_exemplars_turns_under_one_header() -> None:
    assert prompt_of("ceval", [SHOWN], is_chat=True) == (
        Message(
            "user",
            "以下是中国关于解剖学考试的单项选择题，请选出其中的正确答案。\n\n乙？\nA. 五\nB. 六\nC. 七\nD. 八\n答案：",
        ),
        Message("assistant", "D"),
        Message("user", "甲？ \nA. 一\nB. 二\nC. 三\nD. 四\n答案："),
    )


def test_cmmlu_marks_the_question_and_is_no_chat() -> None:
    assert prompt_of("cmmlu", [SHOWN], is_chat=True) == (
        "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
        "题目：乙？\nA. 五\nB. 六\nC. 七\nD. 八\n答案是：D\n\n"
        "题目：甲？ \nA. 一\nB. 二\nC. 三\nD. 四\n答案是："
    )


@pytest.mark.parametrize(
    ("dataset", "header"),
    [
        ("ceval", "以下是中国关于解剖学的单项选择题，请选出其中的正确答案。\n\n"),
        ("cmmlu", "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"),
    ],
)
def test_lm_eval_strips_questions_and_puts_a_space_before_letters(dataset: str, header: str) -> None:
    assert prompt_of("lm-eval", [SHOWN], dataset=dataset) == (
        f"{header}乙？\nA. 五\nB. 六\nC. 七\nD. 八\n答案： D\n\n甲？\nA. 一\nB. 二\nC. 三\nD. 四\n答案："
    )
    assert Writer(PROTOCOLS["lm-eval"], dataset, False).options(ASKED) == (" A", " B", " C", " D")


@pytest.mark.parametrize(
    ("form", "words"), [("one", "单项选择题"), ("several", "多项选择题"), ("open", "选择题（正确选项可能不止一个）")]
)
def test_gen_says_how_many_options_may_be_right(form: str, words: str) -> None:
    question = Question("q", "甲？", ("一", "二"), "AB", "", "医学", form)  # type: ignore[arg-type]
    [message] = Writer(PROTOCOLS["gen"], "cmb", True).ask(question).prompt
    assert isinstance(message, Message)
    assert message.content == f"以下是关于医学的{words}，请给出正确选项的字母。\n\n甲？\nA. 一\nB. 二\n答案："


def test_paper_writes_the_authors_prompt_and_without_a_template_their_turns() -> None:
    asked = "下面是一道关于解剖学的单选题，请选择正确的答案选项。\n问题：甲？ \n\nA.一\nB.二\nC.三\nD.四"
    assert prompt_of("paper", is_chat=True) == (Message("user", asked),)
    assert prompt_of("paper") == f"[human]:{asked}\n[bot]:"


def kept_by_the_official_rule(header: int, exemplars: Sequence[int], question: int, limit: int) -> list[int] | None:
    """Places of the exemplars that CMMLU's script keeps, by lengths; None if the header goes too."""
    kept = list(range(len(exemplars)))
    if header + question > limit:
        return None
    while kept and sum(exemplars[place] for place in kept) >= limit - header - question:
        longest = max(exemplars[place] for place in kept)
        kept = [place for place in kept if exemplars[place] != longest]
    return kept


@pytest.mark.parametrize("is_chat", [False, True])
def test_too_long_prompts_lose_the_longest_exemplars_first_then_the_header(is_chat: bool) -> None:
    protocol = PROTOCOLS["ceval" if is_chat else "cmmlu"]
    exemplars = [
        Question(str(place), "长" * length, ("一", "二", "三", "四"), "C", "", "解剖学")
        for place, length in enumerate((5, 40, 12, 40, 25))
    ]
    bare = Writer(protocol, "cmmlu", is_chat)

    def length(prompt: Prompt) -> int:
        return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)

    question = length(bare.ask(ASKED).prompt) - len(bare.wording.header.format(topic="解剖学"))
    header = length(bare.ask(ASKED).prompt) - question
    sizes = [length(bare.ask(ASKED, [one]).prompt) - header - question for one in exemplars]
    seen = set()
    for limit in range(question, header + question + sum(sizes) + 2):
        writer = Writer(protocol, "cmmlu", is_chat, lambda prompt, limit=limit: length(prompt) < limit)
        found = writer.ask(ASKED, exemplars)
        # The script lets a prompt without exemplars fill the limit; with them it wants one place more.
        kept = kept_by_the_official_rule(header, sizes, question, limit)
        if header + question == limit:
            continue
        assert found.is_headless == (kept is None)
        assert found.dropped == len(exemplars) - len(kept or [])
        assert found.prompt == (
            bare.ask(ASKED, [exemplars[place] for place in kept]).prompt
            if kept is not None
            else ((Message("user", bare._body(ASKED)),) if is_chat else bare._body(ASKED))
        )
        seen.add(found.dropped)
    assert seen == {0, 2, 3, 4, 5}


def test_lm_eval_shortens_nothing() -> None:
    writer = Writer(PROTOCOLS["lm-eval"], "cmmlu", False, lambda prompt: False)
    assert writer.ask(ASKED, [SHOWN]).dropped == 0
