"""Records of every schema of comparisons, and those from which nothing can be learnt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.data.preferences import Comparison, dump, load, parse_comparison, recognise_comparison, spread
from model.chat import ConversationError

S, Q1, A1, Q2 = "只答医学问题。", "头疼怎么办？", "先休息。", "还疼呢？"
GOOD, FAIR, BAD = "请就诊检查。", "多喝水。", "不用管。"
ONE = [("user", Q1)]
TWO = [("user", Q1), ("assistant", A1), ("user", Q2)]
SYSTEM = ("system", S)
PAIR = [(GOOD, 1.0), (BAD, 0.0)]
GRADED = [(GOOD, 9.0), (FAIR, 5.0), (BAD, 5.0)]
RANKED = [(GOOD, -1.0), (BAD, -2.0)]


def said(*more: str) -> list[dict[str, str]]:
    return [{"role": more[place], "content": more[place + 1]} for place in range(0, len(more), 2)]


def spoken(*more: str) -> list[dict[str, str]]:
    return [{"from": more[place], "value": more[place + 1]} for place in range(0, len(more), 2)]


def parts(found: Comparison) -> tuple[list[tuple[str, str]], list[tuple[str, float]]]:
    return [(message.role, message.content) for message in found.prompt], [tuple(each) for each in found.responses]


def keyed(record: Any, **keys: str) -> Comparison:
    return recognise_comparison(record, {key: value.split("+") for key, value in keys.items()})


BOTH = {"chosen": GOOD, "rejected": BAD}
BEFORE = said("user", Q1, "assistant", A1, "user", Q2)
HH = f"\n\nHuman: {Q1}\n\nAssistant: {A1}\n\nHuman: {Q2}\n\nAssistant: "

KNOWN: dict[str, tuple[Any, list[tuple[str, str]], list[tuple[str, float]], str]] = {
    "prompt": ({"prompt": Q1, **BOTH}, ONE, PAIR, "chosen > rejected"),
    "names in capitals": ({"Prompt": Q1, "Chosen": GOOD, " REJECTED ": BAD}, ONE, PAIR, "chosen > rejected"),
    "instruction and input": (
        {"instruction": Q1, "input": "三天了", **BOTH},
        [("user", f"{Q1}\n三天了")],
        PAIR,
        "chosen > rejected",
    ),
    "question in Chinese": ({"问题": Q1, **BOTH}, ONE, PAIR, "chosen > rejected"),
    "question with system and history": (
        {"system": S, "history": [[Q1, A1]], "question": Q2, "response_chosen": GOOD, "response_rejected": BAD},
        [SYSTEM, *TWO],
        PAIR,
        "response_chosen > response_rejected",
    ),
    "positive and negative": ({"prompt": Q1, "pos_resp": GOOD, "neg_resp": BAD}, ONE, PAIR, "pos_resp > neg_resp"),
    "two outputs, the better first": (
        {"instruction": Q1, "input": "", "output": [GOOD, BAD]},
        ONE,
        PAIR,
        "output: better, worse",
    ),
    "ShareGPT with system": (
        {"conversations": spoken("system", S, "human", Q1), **BOTH},
        [SYSTEM, *ONE],
        PAIR,
        "chosen > rejected",
    ),
    "ShareGPT with messages for answers": (
        {
            "conversations": spoken("human", Q1, "gpt", A1, "human", Q2),
            "chosen": spoken("gpt", GOOD)[0],
            "rejected": spoken("gpt", BAD)[0],
        },
        TWO,
        PAIR,
        "chosen > rejected",
    ),
    "messages before, a list of one message each": (
        {"prompt": BEFORE, "chosen": said("assistant", GOOD), "rejected": said("assistant", BAD)},
        TWO,
        PAIR,
        "chosen > rejected",
    ),
    "whole conversations": (
        {"chosen": [*BEFORE, *said("assistant", GOOD)], "rejected": [*BEFORE, *said("assistant", BAD)]},
        TWO,
        PAIR,
        "chosen > rejected as conversations",
    ),
    "whole conversations with a system prompt beside": (
        {"system": S, "chosen": said("user", Q1, "assistant", GOOD), "rejected": said("user", Q1, "assistant", BAD)},
        [SYSTEM, *ONE],
        PAIR,
        "chosen > rejected as conversations",
    ),
    "whole conversations in one text": (
        {"chosen": HH + GOOD, "rejected": HH + BAD},
        TWO,
        PAIR,
        "chosen > rejected as conversations",
    ),
    "a pair with scores": (
        {"prompt": Q1, **BOTH, "score_chosen": 8.5, "score_rejected": "6"},
        ONE,
        [(GOOD, 8.5), (BAD, 6.0)],
        "chosen > rejected",
    ),
    "a list with scores": (
        {"prompt": Q1, "responses": [{"text": text, "score": score} for text, score in GRADED]},
        ONE,
        GRADED,
        "responses with grades",
    ),
    "a list with ranks, of which 1 is the best": (
        {"question": Q1, "answers": [{"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 2}]},
        ONE,
        RANKED,
        "answers with ranks",
    ),
    "a list with both: scores are more than ranks": (
        {"prompt": Q1, "responses": [{"text": GOOD, "rank": 1, "score": 7}, {"text": BAD, "rank": 2, "score": 3}]},
        ONE,
        [(GOOD, 7.0), (BAD, 3.0)],
        "responses with grades",
    ),
    "two lists side by side": (
        {"query": Q1, "responses": [GOOD, BAD], "scores": [3, 1]},
        ONE,
        [(GOOD, 3.0), (BAD, 1.0)],
        "responses beside scores",
    ),
    "repetitions count once": (
        {"prompt": Q1, "responses": [{"text": text, "score": score} for text, score in (*GRADED, (f" {GOOD}", 9))]},
        ONE,
        GRADED,
        "responses with grades",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_schema_is_known_by_its_fields(name: str) -> None:
    record, prompt, responses, schema = KNOWN[name]
    found = parse_comparison(record)
    assert parts(found) == (prompt, responses)
    assert found.schema == schema
    assert load(dump(found)) == found


def test_only_grades_have_margins() -> None:
    assert parse_comparison(KNOWN["a list with scores"][0]).has_margins
    assert parse_comparison(KNOWN["a pair with scores"][0]).has_margins
    assert not parse_comparison(KNOWN["prompt"][0]).has_margins
    assert not parse_comparison(KNOWN["a list with ranks, of which 1 is the best"][0]).has_margins


@pytest.mark.parametrize(
    "record",
    [
        {"label": "1", "question": Q1, "answer": GOOD},
        {"prompt": Q1, "response": GOOD, "score": 1},
        {"问题": Q1, "回答": GOOD, "评分": 1.0},
        {"conversations": spoken("human", Q1, "gpt", GOOD), "rating": 1},
    ],
)
def test_an_answer_with_a_grade_is_a_candidate(record: Any) -> None:
    found = recognise_comparison(record)
    assert parts(found) == (ONE, [(GOOD, 1.0)]) and found.is_candidate
    with pytest.raises(ConversationError, match="nothing to compare it with"):
        parse_comparison(record)


def test_fields_of_a_table_lose_the_quotes_of_csv() -> None:
    row = {"label": "0", "question": '他说""疼""', "answer": '"先""热敷""，再按摩"'}
    assert parts(recognise_comparison(row)) == ([("user", '他说""疼""')], [('先"热敷"，再按摩', 0.0)])
    for kept in ('"热敷"', '"热敷"或"冷敷"', '""', '"""', '"一""二"三"'):
        assert recognise_comparison({**row, "answer": kept}).responses[0].text == kept


KEYED: dict[str, tuple[dict[str, Any], dict[str, str], list[tuple[str, str]], list[tuple[str, float]]]] = {
    "a pair": (
        {"ask": Q1, "up": GOOD, "down": BAD},
        {"user": "ask", "chosen": "up", "rejected": "down"},
        ONE,
        PAIR,
    ),
    "a question of two fields, with system and history": (
        {"sys": S, "past": [[Q1, A1]], "ask": "还疼", "more": "呢？", "up": GOOD, "down": BAD},
        {"system": "sys", "history": "past", "user": "ask+more", "chosen": "up", "rejected": "down"},
        [SYSTEM, ("user", Q1), ("assistant", A1), ("user", "还疼\n呢？")],
        PAIR,
    ),
    "turns": (
        {"said": [{"who": "user", "what": Q1}], "up": GOOD, "down": BAD},
        {"turns": "said", "role": "who", "content": "what", "chosen": "up", "rejected": "down"},
        ONE,
        PAIR,
    ),
    "a known question": ({"prompt": Q1, "up": GOOD, "down": BAD}, {"chosen": "up", "rejected": "down"}, ONE, PAIR),
    "a list with grades": (
        {"ask": Q1, "all": [{"words": text, "points": points} for text, points in GRADED]},
        {"user": "ask", "responses": "all", "text": "words", "score": "points"},
        ONE,
        GRADED,
    ),
    "a list with ranks": (
        {"ask": Q1, "all": [{"text": GOOD, "place": 1}, {"text": BAD, "place": 2}]},
        {"user": "ask", "responses": "all", "rank": "place"},
        ONE,
        RANKED,
    ),
    "a candidate": (
        {"ask": Q1, "reply": GOOD, "is_good": 1},
        {"user": "ask", "assistant": "reply", "score": "is_good"},
        ONE,
        PAIR[:1],
    ),
}


@pytest.mark.parametrize("name", KEYED)
def test_other_fields_are_mapped_by_keys(name: str) -> None:
    record, keys, prompt, responses = KEYED[name]
    found = keyed(record, **keys)
    assert parts(found) == (prompt, responses) and found.schema == "--data.keys"


def test_records_without_the_named_fields_are_recognised_by_themselves() -> None:
    found = keyed({"prompt": Q1, **BOTH}, user="ask", chosen="up", rejected="down")
    assert parts(found) == (ONE, PAIR) and found.schema == "chosen > rejected"


LISTED = {"prompt": Q1, "responses": [{"text": GOOD, "score": 2}, {"text": BAD, "score": 1}]}

REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ([Q1], "a record is an object, this one is a list"),
    "no known field": ({"a": 1}, 'no comparison of answers is known by these fields; this record has "a"'),
    "a conversation": (
        {"messages": said("user", Q1, "assistant", A1)},
        'these fields; this record has "messages"; conversations are for tools/sft.py',
    ),
    "a better answer alone": (
        {"conversations": said("user", Q1), "chosen": A1},
        '^"rejected" is missing; this record has "conversations", "chosen"$',
    ),
    "a worse answer alone": ({"prompt": Q1, "response_rejected": A1}, '^"response_chosen" is missing;'),
    "answers without grades": ({"prompt": Q1, "responses": [GOOD, BAD]}, "no comparison of answers is known"),
    "no question": (BOTH, "no question is known by these fields; beside its answers this record has nothing"),
    "an empty question": ({"prompt": " ", **BOTH}, r"turn 1 \(user\) is empty"),
    "a question that is answered": (
        {"prompt": said("user", Q1, "assistant", A1), **BOTH},
        "no question stands before the answers",
    ),
    "the same twice": ({"prompt": Q1, "chosen": GOOD, "rejected": f"{GOOD}\n"}, "the better and the worse .* the same"),
    "an empty answer": ({"prompt": Q1, "chosen": "", "rejected": BAD}, "answer 1 is empty"),
    "no answer": ({"prompt": Q1, "chosen": GOOD, "rejected": None}, "answer 2 is empty"),
    "an answer that is no text": ({"prompt": Q1, "chosen": GOOD, "rejected": 3}, "the worse answer is a number"),
    "an answer of the user's": (
        {"prompt": Q1, "chosen": said("user", GOOD), "rejected": BAD},
        "the better answer is the message of 'user'",
    ),
    "conversations that part early": (
        {"chosen": said("user", Q1, "assistant", GOOD), "rejected": said("user", Q2, "assistant", BAD)},
        "differ before their last answers",
    ),
    "conversations that end with a question": (
        {
            "chosen": said("user", Q1, "assistant", A1, "user", Q2),
            "rejected": said("user", Q1, "assistant", A1, "user", Q1),
        },
        "a conversation does not end with an answer",
    ),
    "scores that contradict the order": (
        {"prompt": Q1, **BOTH, "score_chosen": 1, "score_rejected": 2},
        '"score_chosen" is 1, below "score_rejected", 2',
    ),
    "equal scores of a pair": (
        {"prompt": Q1, **BOTH, "score_chosen": 2, "score_rejected": 2},
        "all 2 answers have one grade",
    ),
    "one answer": ({"prompt": Q1, "responses": LISTED["responses"][:1]}, "its list holds one answer"),
    "one grade": (
        {"prompt": Q1, "responses": [{"text": text, "score": 1} for text in (GOOD, FAIR, BAD)]},
        "all 3 answers have one grade",
    ),
    "two grades for one answer": (
        {"prompt": Q1, "responses": [*LISTED["responses"], {"text": GOOD, "score": 5}]},
        "one answer has two grades, 2 and 5",
    ),
    "an answer without a grade": (
        {"prompt": Q1, "responses": [LISTED["responses"][0], {"text": BAD}]},
        'answer 2 has no grade; it has "text"',
    ),
    "an answer without a text": (
        {"prompt": Q1, "responses": [LISTED["responses"][0], {"score": 2}]},
        'answer 2 has no text; it has "score"',
    ),
    "a grade that is no number": (
        {"prompt": Q1, "responses": [LISTED["responses"][0], {"text": BAD, "score": "差"}]},
        "a grade is a number, not '差'",
    ),
    "a grade that is not finite": ({"label": "nan", "question": Q1, "answer": A1}, "a grade is a number, not 'nan'"),
    "fewer grades than answers": (
        {"prompt": Q1, "responses": [GOOD, BAD], "scores": [1]},
        '2 answers beside 1 grades in "scores"',
    ),
    "a graded question": ({"messages": said("user", Q1), "score": 1}, "it holds no answer"),
    "a multiple-choice question": (
        {"question": Q1, "A": "是", "B": "否", "answer": "A", "label": 1},
        "multiple-choice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reason_is_given(name: str) -> None:
    record, reason = REFUSED[name]
    with pytest.raises(ConversationError, match=reason):
        parse_comparison(record)


def test_grades_that_fp32_cannot_tell_apart_are_one() -> None:
    close = [{"text": GOOD, "score": 0.1}, {"text": BAD, "score": 0.1 + 1e-12}]
    with pytest.raises(ConversationError, match="all 2 answers have one grade"):
        parse_comparison({"prompt": Q1, "responses": close})


def test_of_too_many_answers_the_best_the_worst_and_some_between_are_kept() -> None:
    grades = [5.0, 9.0, 1.0, 7.0, 3.0, 8.0]
    assert spread(grades, 6) == [0, 1, 2, 3, 4, 5]
    assert spread(grades, 2) == [1, 2]
    assert [grades[place] for place in spread(grades, 4)] == [5.0, 9.0, 1.0, 8.0]
    for most in range(2, 30):
        kept = spread(list(range(30)), most)
        assert len(set(kept)) == most and {0, 29} <= set(kept)


def test_stored_text_is_one_line() -> None:
    found = parse_comparison({"prompt": "一\n二", **BOTH})
    assert "\n" not in dump(found) and json.loads(dump(found))[0] == [["user", "一\n二"]]
