"""Prompts on disk: each once, as the template writes it, short enough for its answer, held out as in fine-tuning."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.conversations import ConversationDataConfig, open_conversations
from engine.data.preference_files import read_comparisons
from engine.stored_prompts import Prompts, open_prompts
from model.chat import ChatTemplate, Message
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.small_base import small_conversations, write_small_base, write_small_conversations

CONTEXT, NEW = 64, 16


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTemplate, Tokenizer]:
    tokenizer = Tokenizer.load(write_small_base(tmp_path_factory.mktemp("prompts") / "base"))
    return ChatTemplate.named("chimed", tokenizer), tokenizer


def opened(chat: tuple[ChatTemplate, Tokenizer], folder: Path, *paths: Path, **how: Any) -> Prompts:
    keys, context, new = how.pop("keys", {}), how.pop("context", CONTEXT), how.pop("new", NEW)
    return open_prompts([str(path) for path in paths], keys, *chat, context, new, folder, **how)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def test_every_kind_of_file_gives_its_prompt(chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "咳嗽？"}, {"role": "assistant", "content": "多休息"}]
    history = [*turns, {"role": "user", "content": "还要多久？"}]
    speakers = [{"from": "human", "value": "头晕？"}]
    records = {
        ("咳嗽？",): {"messages": turns},
        ("咳嗽？", "多休息", "还要多久？"): {"messages": [*history, {"role": "assistant", "content": "三天"}]},
        ("腹痛？",): {"question": "腹痛？", "response_chosen": "好", "response_rejected": "坏"},
        ("头晕？",): {"conversations": speakers, "chosen": "好", "rejected": "坏"},
        ("发热？",): {"prompt": "发热？", "responses": [{"text": "好", "score": 2}, {"text": "坏", "score": 1}]},
        ("乏力？",): {"chosen": [{"role": "user", "content": "乏力？"}, {"role": "assistant", "content": "好"}]}
        | {"rejected": [{"role": "user", "content": "乏力？"}, {"role": "assistant", "content": "坏"}]},
        ("一样好？",): {"prompt": "一样好？", "responses": [{"text": "好", "score": 1}, {"text": "坏", "score": 1}]},
        ("心悸？",): {"prompt": "心悸？"},
        ("口渴？",): "口渴？",
    }
    table = tmp_path / "candidates.tsv"
    table.write_text("1\t皮疹？\t好\n0\t皮疹？\t坏\n")
    plain = tmp_path / "plain.txt"
    plain.write_text("恶心？\n")
    prompts = opened(chat, tmp_path / "out", write(tmp_path / "a.jsonl", *records.values()), table, plain, context=512)
    found = prompts.first(100)
    contents = [tuple(message.content for message in prompt.messages) for prompt in found]
    assert contents == [*records, ("皮疹？",), ("恶心？",)]
    template, tokenizer = chat
    for prompt in found:
        assert prompt.ids == template.encode_prompt(tokenizer, prompt.messages)
    assert found[2].fields == list(records.values())[2]
    assert [prompt.position for prompt in found] == list(range(11))


def test_fields_of_comparisons_may_be_named_as_for_a_reward_model(
    chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path
) -> None:
    record = {"题": "咳嗽？", "优": "好", "劣": "坏", "question": "不是这个", "answer": "也不是"}
    keys = {"user": "题", "chosen": "优", "rejected": "劣"}
    (prompt,) = opened(chat, tmp_path / "out", write(tmp_path / "a.jsonl", record), keys=keys).first(9)
    assert prompt.messages == (Message("user", "咳嗽？"),)
    whole = {name: [{"role": "user", "content": "头晕？"}, {"role": "assistant", "content": name}] for name in "优劣"}
    keys = {"chosen": "优", "rejected": "劣"}
    (prompt,) = opened(chat, tmp_path / "out", write(tmp_path / "b.jsonl", whole), keys=keys).first(9)
    assert prompt.messages == (Message("user", "头晕？"),)


def test_prompt_and_longest_answer_fit_the_context(
    chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    template, tokenizer = chat
    long = {"messages": [{"role": "user", "content": "头晕乏力咳嗽" * 30}]}
    turns = [{"role": role, "content": f"{role}{at}"} for at in range(6) for role in ("user", "assistant")]
    longer = {"prompt": "头晕乏力咳嗽" * 40}
    short = {"prompt": "短？"}
    data = write(tmp_path / "a.jsonl", long, {"messages": turns}, short, {"answer": 5}, short, longer)
    shortened, short = opened(chat, tmp_path / "out", data).first(9)
    assert len(shortened.ids) <= CONTEXT - NEW < len(template.encode_prompt(tokenizer, shortened.messages))
    kept = [message for message in shortened.messages if template.encode_prompt(tokenizer, [message])]
    assert any(shortened.ids == template.encode_prompt(tokenizer, kept[start:]) for start in range(2, len(kept), 2))
    assert short.messages[0].content == "短？"
    said = capfd.readouterr().err
    assert "2 prompts" in said and "1 repetitions" in said and "1 without their oldest turns" in said
    tokens = len(template.encode_prompt(tokenizer, [Message("user", long["messages"][0]["content"])]))
    assert f"2 x its last question takes {tokens} tokens of a context of {CONTEXT - NEW + 1} (first {data}:1)" in said
    assert f"(first {data}:4)" in said


def test_a_prompt_may_take_all_that_the_answer_leaves_and_no_token_more(
    chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path
) -> None:
    template, tokenizer = chat
    data = write(tmp_path / "a.jsonl", {"prompt": "短？"})
    size = len(template.encode_prompt(tokenizer, [Message("user", "短？")]))
    assert len(opened(chat, tmp_path / "out", data, context=size + NEW)) == 1
    with pytest.raises(InputError, match="no prompt of it can be used"):
        opened(chat, tmp_path / "out", data, context=size + NEW - 1)


def test_a_system_message_is_given_to_those_that_have_none(
    chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path
) -> None:
    own = {"messages": [{"role": "system", "content": "我的"}, {"role": "user", "content": "咳嗽？"}]}
    data = write(tmp_path / "a.jsonl", own, {"prompt": "头晕？"})
    first, second = opened(chat, tmp_path / "out", data, system="你是医生。").first(9)
    assert [first.messages[0].content, second.messages[0].content] == ["我的", "你是医生。"]
    assert second.ids == chat[0].encode_prompt(chat[1], second.messages)


def test_a_prompt_is_held_out_where_fine_tuning_holds_it_out(
    chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path
) -> None:
    data = write_small_conversations(tmp_path / "a.jsonl")
    prompts = opened(chat, tmp_path / "out", data, context=512)
    train, held_out = prompts.split(0.2)
    corpus = open_conversations(ConversationDataConfig(paths=[str(data)]), *chat, 512, tmp_path / "sft")
    rest, other = corpus.split(0.2)
    conversations = small_conversations()

    def questions(documents: np.ndarray) -> set[str]:
        rows = [conversations[at] for at in documents]
        return {next(turn["content"] for turn in row if turn["role"] == "user") for row in rows}

    def asked(some: Prompts) -> set[str]:
        return {next(m.content for m in prompt.messages if m.role == "user") for prompt in some.first(len(some))}

    assert 20 < len(held_out) < 120
    assert asked(train) == questions(rest.documents()) and asked(held_out) == questions(other.documents())
    assert train.without(held_out).fingerprint == train.fingerprint
    assert len(prompts.without(held_out)) == len(train)
    assert len(train.split(0.0)[1]) == 0


def test_each_side_gets_a_question_where_there_are_two(chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path) -> None:
    prompts = opened(chat, tmp_path / "out", write(tmp_path / "a.jsonl", *({"prompt": f"{at}？"} for at in range(3))))
    for fraction in (1e-9, 0.999999):
        assert all(len(side) for side in prompts.split(fraction))


def test_files_are_read_once_for_all_ranks_and_runs_until_they_change(
    chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": "咳嗽？"})
    first = opened(chat, tmp_path / "out", data)
    assert "Reading" in capfd.readouterr().err
    again = opened(chat, tmp_path / "out", data)
    assert "Reading" not in capfd.readouterr().err
    assert again.first(1) == first.first(1) and again.fingerprint == first.fingerprint
    write(data, {"prompt": "头晕？"})
    os.utime(data, ns=(1, 1))
    changed = opened(chat, tmp_path / "out", data)
    assert changed.first(1)[0].messages[0].content == "头晕？"
    assert changed.fingerprint != first.fingerprint
    marker = max((tmp_path / "out" / "prepared").glob("*/prompts.json"), key=lambda path: path.stat().st_mtime)
    marker.unlink()  # killed while it was read
    assert opened(chat, tmp_path / "out", data).first(1) == changed.first(1)


def test_an_answer_that_leaves_no_room_is_refused(chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": "咳嗽？"})
    with pytest.raises(InputError, match="leaves no room for its prompt in a context of 64"):
        opened(chat, tmp_path / "out", data, new=64)


@pytest.mark.parametrize("name", ["dpo_zh_500.jsonl", "ranked_first_turn.jsonl", "cmedqa_candidates.tsv"])
def test_every_record_of_real_preferences_gives_a_prompt(
    chat: tuple[ChatTemplate, Tokenizer], tmp_path: Path, real_data: Path, name: str
) -> None:
    path = real_data / "preference" / name
    prompts = opened(chat, tmp_path, path, context=1 << 15)
    records = list(read_comparisons([path]))
    found = {prompt.messages for prompt in prompts.first(len(prompts))}
    assert len(records) >= 293 and {record.prompt for record in records} <= found
    (report,) = tmp_path.glob("prepared/*/prompts.json")
    assert json.loads(report.read_text())["refused"] == {}
