"""A conversation with a model: what it is asked, what is kept, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.chatting import Chat, ChatModel, SamplingConfig
from model.chat import ConversationError, Message
from model.errors import InputError
from tests.small_base import write_small_base
from tests.tools.small_chat import end_answers_at, write_small_chat_model

GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def model(directory: Path) -> ChatModel:
    return ChatModel.open(str(directory))


def ask(chat: Chat, question: str) -> str:
    return "".join(event.text for event in chat.ask(question))


def test_a_turn_is_asked_behind_those_before_it(model: ChatModel) -> None:
    chat = Chat(model, GREEDY, system="你是医生。")
    answers = [ask(chat, "头晕怎么办？"), ask(chat, "咳嗽呢？")]
    said = [("system", "你是医生。"), ("user", "头晕怎么办？"), ("assistant", answers[0])]
    said += [("user", "咳嗽呢？"), ("assistant", answers[1])]
    assert chat.messages == [Message(*message) for message in said]  # type: ignore[arg-type]
    again = Chat(model, GREEDY, system="你是医生。")
    again.turns = chat.turns[:2]
    assert ask(again, "咳嗽呢？") == answers[1]
    assert ask(Chat(model, GREEDY), "咳嗽呢？") != answers[1]


def test_answers_are_drawn_from_the_seed(model: ChatModel) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    first, second, other = (Chat(model, sampling, seed=seed) for seed in (1, 1, 2))
    drawn = [ask(chat, "头晕？") for chat in (first, second, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    first.turns = []
    assert ask(first, "头晕？") != drawn[0], "every answer of a chat is a draw of its own"


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(model: ChatModel) -> None:
    chat = Chat(model, GREEDY)
    events = chat.ask("头晕怎么办？")
    seen = "".join(next(events).text for _ in range(3))
    events.close()  # type: ignore[attr-defined]
    assert chat.turns == [Message("user", "头晕怎么办？"), Message("assistant", seen)]
    assert model.generator.is_idle
    assert ask(chat, "后来呢？")


def test_the_oldest_turns_go_whole_when_the_context_is_full(model: ChatModel) -> None:
    chat = Chat(model, GREEDY, system="你是医生。")
    chat.turns = [Message(role, f"第{n}句，" + "头晕" * 10) for n in range(1, 9) for role in ("user", "assistant")]
    asked: list[list[int]] = []
    add = model.generator.add
    model.generator.add = lambda request: asked.append(list(request.prompt)) or add(request)  # type: ignore
    try:
        ask(chat, "现在呢？")
    finally:
        model.generator.add = add  # type: ignore[method-assign]
    dropped, (prompt,) = chat.dropped_turns, asked
    assert 0 < dropped < 8
    rest = [Message("system", "你是医生。"), *chat.turns[2 * dropped : 16], Message("user", "现在呢？")]
    assert prompt == model.template.encode_prompt(model.tokenizer, rest)
    # Room for the longest answer is left, and one turn more would not have left it.
    one_more = [rest[0], *chat.turns[2 * dropped - 2 : 16], rest[-1]]
    room = model.generator.context - GREEDY.max_new_tokens
    assert len(prompt) <= room < len(model.template.encode_prompt(model.tokenizer, one_more))
    assert len(chat.turns) == 18, "what is left out of a prompt is not forgotten"


def test_a_question_may_take_the_room_of_its_answer_but_not_all_of_it(model: ChatModel) -> None:
    long = SamplingConfig(temperature=0, max_new_tokens=100)
    frame = len(model.prompt([Message("user", "")], 1).ids)
    nearly = [Message("user", "头" * (model.generator.context - frame - 5))]
    prompt = model.prompt(nearly, long.max_new_tokens)
    assert model.generator.context - 5 <= len(prompt.ids) < model.generator.context
    with pytest.raises(ConversationError, match="its last question takes"):
        list(Chat(model, long).ask("头" * model.generator.context))


def test_every_token_that_the_directory_names_ends_an_answer(directory: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(directory, tmp_path / "model"))
    ids = [event.id for event in Chat(ChatModel.open(str(directory)), GREEDY).ask("头晕怎么办？")]
    assert len(set(ids)) > 3
    end = next(index for index in ids[2:] if index not in ids[:2])
    end_answers_at(other, end)
    model = ChatModel.open(str(other))
    assert model.stop_ids == (2, end)
    events = list(Chat(model, GREEDY).ask("头晕怎么办？"))
    assert [event.id for event in events] == ids[: ids.index(end) + 1]
    assert events[-1].end_reason == "stop"


def test_a_fingerprint_tells_models_apart_by_a_single_weight(directory: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(directory, tmp_path / "model"))
    assert ChatModel.open(str(other)).fingerprint == ChatModel.open(str(directory)).fingerprint
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (other / "model.safetensors").write_bytes(content)
    assert ChatModel.open(str(other)).fingerprint != ChatModel.open(str(directory)).fingerprint


def test_a_template_is_given_only_where_none_is_stored(directory: Path, tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base", 256)
    with pytest.raises(InputError, match=r"stores no chat template. Name the one .* --chat.template chimed"):
        ChatModel.open(str(base))
    assert ChatModel.open(str(base), "plain").template.name == "plain"
    with pytest.raises(InputError, match="stores the chat template chimed, but plain is asked for"):
        ChatModel.open(str(directory), "plain")


def test_what_does_not_chat_is_refused(directory: Path, tmp_path: Path) -> None:
    scorer = Path(shutil.copytree(directory, tmp_path / "scorer"))
    facts = json.loads((scorer / "config.json").read_text())
    (scorer / "config.json").write_text(json.dumps({**facts, "architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(InputError, match="is a reward model"):
        ChatModel.open(str(scorer))
    (scorer / "state").mkdir()
    with pytest.raises(InputError, match="has not finished writing its model"):
        ChatModel.open(str(scorer))
    with pytest.raises(InputError, match=r"there is no such directory. Run tools/sft.py first"):
        ChatModel.open(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("device", "sentence"),
    [("mps", "no such device"), ("gpu", "no such device"), ("cuda:99", "there is no such GPU here")],
)
def test_a_device_that_is_not_there_is_refused(directory: Path, device: str, sentence: str) -> None:
    with pytest.raises(InputError, match=f"--device {device}: {sentence}"):
        ChatModel.open(str(directory), device=device)
