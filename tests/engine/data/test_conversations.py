"""Records of every schema, and those that are no conversation."""

from __future__ import annotations

from typing import Any

import pytest

from engine.data.conversations import conversation_hash, parse_conversation, recognise
from model.chat import ConversationError, Message

S, Q1, A1, Q2, A2 = "只答医学问题。", "头疼怎么办？", "先休息。", "还疼呢？", "请就诊。"
ONE = [("user", Q1), ("assistant", A1)]
TWO = [*ONE, ("user", Q2), ("assistant", A2)]
SYSTEM = ("system", S)


def turns(record: Any, **keys: str) -> list[tuple[str, str]]:
    names = {key: value.split("+") for key, value in keys.items()}
    return [(message.role, message.content) for message in parse_conversation(record, names)]


def pair(role: str, content: str, *more: str) -> list[dict[str, str]]:
    """Turns under these two names, whose values alternate in `more`."""
    return [{role: more[place], content: more[place + 1]} for place in range(0, len(more), 2)]


def spoken(*more: str) -> list[dict[str, str]]:
    return pair("from", "value", *more)


def said(*more: str) -> list[dict[str, str]]:
    return pair("role", "content", *more)


KNOWN: dict[str, tuple[Any, list[tuple[str, str]], str]] = {
    "Alpaca": ({"instruction": Q1, "input": "", "output": A1}, ONE, "Alpaca"),
    "Alpaca without input": ({"instruction": Q1, "output": A1}, ONE, "Alpaca"),
    "Alpaca with input": (
        {"instruction": "译", "input": "痛", "output": "ache"},
        [("user", "译\n痛"), ("assistant", "ache")],
        "Alpaca",
    ),
    "Alpaca with system": ({"system": S, "instruction": Q1, "output": A1}, [SYSTEM, *ONE], "Alpaca"),
    "Alpaca with history": (
        {"instruction": Q2, "input": "", "output": A2, "history": [[Q1, A1]]},
        TWO,
        "Alpaca with history",
    ),
    "history that is empty": ({"instruction": Q1, "output": A1, "history": []}, ONE, "Alpaca with history"),
    "history in a cell of a table": (
        {"question": Q2, "answer": A2, "history": f'[["{Q1}", "{A1}"]]'},
        TWO,
        "question = answer with history",
    ),
    "Zhongjing's other rows": ({"instruct": Q1, "output": A1}, ONE, "instruct+input = output"),
    "lists of one": ({"instruction": [Q1], "input": "", "output": [A1]}, ONE, "Alpaca"),
    "ShareGPT": ({"conversations": spoken("human", Q1, "gpt", A1, "human", Q2, "gpt", A2)}, TWO, "ShareGPT"),
    "ShareGPT, one conversation": ({"conversation": spoken("user", Q1, "chatgpt", A1)}, ONE, "ShareGPT"),
    "other speakers": ({"conversations": spoken("Human", Q1, "bot", A1, "user", Q2, " model ", A2)}, TWO, "ShareGPT"),
    "speakers in Chinese": ({"conversations": spoken("患者", Q1, "医生", A1)}, ONE, "ShareGPT"),
    "ShareGPT with system": (
        {"conversations": spoken("system", S, "human", Q1, "gpt", A1)},
        [SYSTEM, *ONE],
        "ShareGPT",
    ),
    "ShareGPT with system beside": (
        {"system_prompt": S, "conversations": spoken("human", Q1, "gpt", A1)},
        [SYSTEM, *ONE],
        "ShareGPT",
    ),
    "messages": ({"messages": said("system", S, "user", Q1, "assistant", A1)}, [SYSTEM, *ONE], "messages"),
    "an empty system prompt is none": ({"messages": said("system", " ", "user", Q1, "assistant", A1)}, ONE, "messages"),
    "messages in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": Q1[:3]}, {"type": "text", "text": Q1[3:]}]},
                {"role": "assistant", "content": A1},
            ]
        },
        ONE,
        "messages",
    ),
    "messages and nothing else": (said("user", Q1, "assistant", A1), ONE, "a list of turns"),
    "both speakers in a turn": (
        {"conversation": [{"human": Q1, "assistant": A1}, {"assistant": A2, "human": Q2}]},
        TWO,
        "conversation",
    ),
    "input and output in a turn": (
        {"conversation": [{"system": S, "input": Q1, "output": A1}]},
        [SYSTEM, *ONE],
        "conversation",
    ),
    "texts that alternate": ({"conversations": [Q1, A1, Q2, A2]}, TWO, "conversations"),
    "lists of turns": ({"prompt": [Q1, Q2], "output": [A1, A2]}, TWO, "prompt = output"),
    "prompt and output": ({"prompt": Q1, "output": A1}, ONE, "prompt = output"),
    "messages for prompt and completion": (
        {"prompt": said("system", S, "user", Q1), "completion": said("assistant", A1)},
        [SYSTEM, *ONE],
        "prompt = completion",
    ),
    "prompt and completion": ({"prompt": Q1, "completion": A1}, ONE, "prompt = completion"),
    "query and response": ({"query": Q1, "response": A1}, ONE, "query = response"),
    "a title and a question": (
        {"department": "内科", "title": "头疼", "ask": Q1, "answer": A1},
        [("user", f"头疼\n{Q1}"), ("assistant", A1)],
        "title+ask = answer",
    ),
    "a title that is the question": ({"title": Q1, "ask": Q1, "answer": A1}, ONE, "title+ask = answer"),
    "question and answer": ({"id": 7, "question": Q1, "answer": A1, "score": 0.5}, ONE, "question = answer"),
    "names in capitals": ({"Question": Q1, "Answer ": A1}, ONE, "question = answer"),
    "q and a": ({"q": Q1, "a": A1}, ONE, "q = a"),
    "Chinese names": ({"问题": Q1, "回答": A1}, ONE, "问题 = 回答"),
    "other Chinese names": ({"提问": Q1, "答案": A1}, ONE, "提问 = 答案"),
    "a hospital's names": ({"患者提问": Q1, "医生回复": A1}, ONE, "患者提问 = 医生回复"),
    "a last question without an answer": (
        {"conversations": spoken("human", Q1, "gpt", A1, "human", Q2)},
        TWO[:3],
        "ShareGPT",
    ),
    "columns that a table holds for other records": (
        {"question": Q1, "answer": A1, "options": None, "option": "", "history": None, "tools": None},
        ONE,
        "question = answer",
    ),
    "fields that a table holds for other turns": (
        {
            "messages": [
                {"role": "user", "content": Q1, "weight": None, "tool_calls": None},
                {"role": "assistant", "content": A1, "weight": None, "tool_calls": None},
            ]
        },
        ONE,
        "messages",
    ),
    "nothing but a question": ({"messages": said("user", Q1)}, ONE[:1], "messages"),
    "space is kept": (
        {"instruction": " a\r\n", "output": "\tb "},
        [("user", " a\r\n"), ("assistant", "\tb ")],
        "Alpaca",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_schemas_are_known_by_their_fields(name: str) -> None:
    record, expected, schema = KNOWN[name]
    assert turns(record) == expected
    assert recognise(record).schema == schema


@pytest.mark.parametrize(
    ("record", "keys", "expected"),
    [
        ({"ctx": Q1, "target": A1}, {"user": "ctx", "assistant": "target"}, ONE),
        (
            {"t": "头疼", "b": Q1, "r": A1},
            {"user": "t+b", "assistant": "r"},
            [("user", f"头疼\n{Q1}"), ("assistant", A1)],
        ),
        ({"t": None, "b": Q1, "r": A1}, {"user": "t+b", "assistant": "r"}, ONE),
        ({"p": S, "x": Q1, "y": A1}, {"user": "x", "assistant": "y", "system": "p"}, [SYSTEM, *ONE]),
        ({"x": Q2, "y": A2, "past": [[Q1, A1]]}, {"user": "x", "assistant": "y", "history": "past"}, TWO),
        ({"x": Q1, "y": A1}, {"user": "x", "assistant": "y", "system": "p", "history": "past"}, ONE),
        (
            {"dialog": pair("speaker", "text", "病人", Q1, "Doctor", A1)},
            {"turns": "dialog", "role": "speaker", "content": "text"},
            ONE,
        ),
        ({"data": [Q1, A1, Q2, A2]}, {"turns": "data"}, TWO),
        # Keys come before what is known, and what is known serves records without the keys' fields.
        ({"question": "别用", "answer": "别用", "x": Q1, "y": A1}, {"user": "x", "assistant": "y"}, ONE),
        ({"instruction": Q1, "output": A1}, {"user": "x", "assistant": "y"}, ONE),
        ({"question": Q1, "options": "A 甲", "answer": A1}, {"user": "question", "assistant": "answer"}, ONE),
    ],
)
def test_keys_map_any_other_schema(record: Any, keys: dict[str, str], expected: list[tuple[str, str]]) -> None:
    assert turns(record, **keys) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (5, "a record is an object, this one is a number"),
        ("文", "a record is an object, this one is a text"),
        ({"id": 1, "note": "x"}, 'no conversation is known by these fields; this record has "id", "note"'),
        ({"text": "正文"}, 'this record has "text"; texts are for tools/pretrain.py'),
        ({"conversations": []}, "it holds no turn"),
        ({"conversations": spoken("system", S)}, "it holds no turn"),
        ({"conversations": spoken("gpt", A1, "human", Q1)}, "turn 1 is the assistant's"),
        ({"conversations": spoken("human", Q1, "human", Q2)}, "turns 1 and 2 are both the user's"),
        (
            {"conversations": spoken("system", S, "human", Q1, "gpt", A1, "gpt", A2)},
            "turns 3 and 4 are both the assistant's",
        ),
        ({"conversations": spoken("human", " \n", "gpt", A1)}, r"turn 1 \(user\) is empty"),
        ({"instruction": Q1, "input": "", "output": ""}, r"turn 2 \(assistant\) is empty"),
        ({"instruction": "", "input": None, "output": A1}, r"turn 1 \(user\) is empty"),
        ({"instruction": Q1, "output": None}, r"turn 2 \(assistant\) is empty"),
        ({"messages": [{"role": "user", "content": None}]}, r"turn 1 \(user\) is empty"),
        ({"conversations": spoken("narrator", Q1)}, 'turn 1 has the unknown role "narrator"'),
        ({"messages": [{"role": 3, "content": Q1}]}, "turn 1 has the unknown role 3"),
        (
            {"messages": said("user", Q1, "system", S)},
            "turn 2 is a system prompt, which only the first turn can be",
        ),
        ({"system": S, "messages": said("system", S, "user", Q1)}, "it has two system prompts"),
        ({"messages": said("user", Q1, "tool", "{}")}, "turn 2 is a tool's"),
        ({"conversations": spoken("human", Q1, "function_call", "{}")}, "turn 2 is a tool's"),
        (
            {"messages": [{"role": "user", "content": Q1}, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "turn 2 calls a tool",
        ),
        ({"tools": "[{}]", "messages": said("user", Q1)}, "it describes tools"),
        (
            {"messages": [{"role": "user", "content": Q1}, {"role": "assistant", "content": A1, "weight": 0}]},
            "turn 2 has a weight",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "turn 1 is a number, not a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "turn 1 holds a part of type 'image_url'",
        ),
        ({"messages": [{"name": "user", "words": Q1}]}, 'turn 1 has no role and content; it has "name", "words"'),
        ({"messages": [[Q1, A1, Q2]]}, "turn 1 is a list of 3"),
        ({"messages": [None]}, "turn 1 is null"),
        ({"prompt": [Q1, Q2, Q1], "output": [A1]}, "3 questions beside 1 answers do not make turns"),
        ({"instruction": Q1, "output": [A1, A2]}, "1 questions beside 2 answers do not make turns"),
        ({"question": Q1, "answer": A1, "history": "前文"}, '"history" is a text, not a list of turns'),
        ({"question": Q1, "answer": A1, "history": "[" * 100_000}, '"history" is a text, not a list of turns'),
        ({"question": Q1, "answer": A1, "history": 3}, '"history" is a number, not a list of turns'),
        ({"question": Q1, "options": {"A": "甲"}, "answer": "A"}, "it is a multiple-choice question"),
        ({"Question": Q1, "A": "甲", "B": "乙", "Answer": "A"}, "it is a multiple-choice question"),
    ],
)
def test_what_is_no_conversation_says_why(record: Any, reason: str) -> None:
    with pytest.raises(ConversationError, match=reason):
        parse_conversation(record)


def test_a_field_that_keys_name_and_nobody_has_is_said() -> None:
    with pytest.raises(ConversationError, match='"x" is missing; this record has "y", "z"'):
        turns({"y": A1, "z": Q1}, user="x", assistant="y")


def test_half_of_the_hash_stands_for_all_messages_and_half_for_the_first_question() -> None:
    def halves(*contents: str, system: str = "") -> tuple[bytes, bytes]:
        messages = [Message("system", system)] if system else []
        messages += [Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(contents)]  # type: ignore[arg-type]
        digest = conversation_hash(messages)
        assert len(digest) == 16
        return digest[:8], digest[8:]

    plain = halves(Q1, A1)
    assert halves(Q1, A1) == plain
    for other in (halves(Q1, A2), halves(Q1, A1, Q2, A2), halves(Q1, A1, system=S)):
        assert other[0] != plain[0] and other[1] == plain[1]
    assert halves(f" {Q1[:2]}\r\n{Q1[2:]}", A1)[1] == plain[1]
    assert halves(Q2, A1)[1] != plain[1]
    # Where one message ends and the next begins counts.
    assert halves("甲乙", "丙")[0] != halves("甲", "乙丙")[0]
