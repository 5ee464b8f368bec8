"""Prompts and options in ids: those of lm-evaluation-harness, of both kinds of tokenizer, and what is shortened how."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.model_directory import ModelDirectory
from evals.prompt_encoding import PromptEncoder
from evals.respondent import ModelRespondent
from evals.task import Choose, Chosen, Read, Scored
from model.chat import ConversationError, Message
from model.errors import InputError
from tests.evals.oracle_models import write_oracle_model
from tests.evals.record_encoding import CONTEXT, PAIRS, RECORD
from tests.small_base import small_texts
from tests.tools.small_chat import write_small_chat_model

SHORT = 96  # the context of the model with a template
NEAR = 1e-5  # of a log-probability, in fp32 past two layers


@pytest.fixture(scope="module", params=["spm", "bytes"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def record(kind: str) -> list[dict[str, Any]]:
    """What lm-evaluation-harness says: see `record_encoding.py`."""
    return list(json.loads(RECORD.read_text(encoding="utf-8"))[kind])


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> ModelRespondent:
    directory = write_oracle_model(tmp_path_factory.mktemp("oracle") / kind, kind, CONTEXT)
    return ModelRespondent(ModelDirectory.open(str(directory)))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    """Of a model with a template."""
    directory = write_small_chat_model(tmp_path_factory.mktemp("chat") / "model")
    return PromptEncoder(ModelDirectory.open(str(directory)), SHORT)


def test_prompts_and_options_are_encoded_as_lm_evaluation_harness_does(
    model: ModelRespondent, record: list[dict[str, Any]]
) -> None:
    compared = 0
    for (prompt, option), expected in zip(PAIRS, record, strict=True):
        begun, (own,) = model.encoder.pair(prompt, [option])
        if expected["option"]:
            whole = len(expected["prompt"]) + len(expected["option"]) - 1
            assert begun.cut == max(0, whole - CONTEXT)
            assert (begun.ids, own) == (expected["prompt"][begun.cut :], expected["option"]), (prompt, option)
            compared += 1
    assert compared >= len(PAIRS) - 2


def test_log_probabilities_are_those_of_lm_evaluation_harness(
    model: ModelRespondent, record: list[dict[str, Any]]
) -> None:
    asked = [Choose(str(number), prompt, (option,)) for number, (prompt, option) in enumerate(PAIRS)]
    for response, expected in zip(model.respond(asked), record, strict=True):
        assert isinstance(response, Chosen)
        if "logprob" in expected:
            assert response.logprobs == pytest.approx([expected["logprob"]], abs=NEAR * len(expected["option"]))
            assert response.is_greedy == (expected["is_greedy"],)
            assert response.tokens == (len(expected["option"]),)


def test_a_text_is_as_likely_as_transformers_says(model: ModelRespondent) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    oracle, tokenizer = AutoModelForCausalLM.from_pretrained(model.directory.path), model.directory.tokenizer
    begin = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    texts = ["高血压患者头晕。", "题目：高血压的症状是\n答案：A", "a cough lasting 3 weeks", ""]
    for text, response in zip(texts, model.respond([Read(text, text) for text in texts]), strict=True):
        assert isinstance(response, Scored)
        ids = torch.tensor([begin + tokenizer.encode(text)])
        assert response.tokens == ids.shape[1] - 1 < CONTEXT
        loss = oracle(ids, labels=ids).loss.item() if text else 0.0
        assert response.logprob == pytest.approx(-loss * response.tokens, abs=NEAR * response.tokens)


def test_every_token_of_a_long_text_is_read_once_behind_half_a_context_at_least(chat: PromptEncoder) -> None:
    text = "，".join(small_texts(27))
    windows, half = chat.windows(text), SHORT // 2
    assert [token for _, own in windows for token in own] == chat.tokenizer.encode(text) and len(windows) > 4
    assert windows[0][0] == [chat.tokenizer.bos_id]
    assert all(len(before) + len(own) - 1 == SHORT for before, own in windows[:-1])
    read = list(windows[0][1])
    for before, own in windows[1:]:
        assert before == read[-half:]
        read += own
    assert chat.windows("") == []


def test_messages_are_what_the_template_writes_and_options_go_on_from_there(chat: PromptEncoder) -> None:
    asked = (Message("user", "头晕怎么办？"),)
    begun, own = chat.pair(asked, ["注意休息", "A"])
    whole = chat.template.encode(chat.tokenizer, [*asked, Message("assistant", "注意休息")]).ids
    assert [*begun.ids, *own[0]] == whole[:-1] and (begun.dropped, begun.cut) == (0, 0)
    assert begun == chat.prompt(asked, 1)


def test_messages_lose_their_oldest_turns_whole_and_then_their_oldest_tokens(chat: PromptEncoder) -> None:
    turns = [Message("system", "你是医生。")]
    for finding in ("头晕", "咳嗽", "乏力", "心悸", "发热"):
        turns += [Message("user", f"{finding}怎么办？"), Message("assistant", "注意休息，定期复查。")]
    turns.append(Message("user", "还要注意什么？"))
    begun = chat.prompt(tuple(turns), 12)
    assert 0 < begun.dropped < 5 and begun.cut == 0 and len(begun.ids) <= SHORT - 12
    assert begun.ids == chat.template.encode_prompt(chat.tokenizer, [turns[0], *turns[1 + 2 * begun.dropped :]])
    long = (*turns[:5], Message("user", "头晕，" * 200))
    begun = chat.prompt(long, 12)
    last = chat.template.encode_prompt(chat.tokenizer, [turns[0], long[-1]])
    assert (begun.dropped, begun.cut) == (2, len(last) - (SHORT - 12)) and begun.ids == last[begun.cut :]


def test_a_long_last_question_takes_an_answers_room_before_it_loses_a_token(chat: PromptEncoder) -> None:
    asked = (Message("user", "头晕，" * 30),)
    whole = chat.template.encode_prompt(chat.tokenizer, asked)
    assert SHORT - 24 < len(whole) < SHORT
    assert chat.prompt(asked, 24, least=1) == (whole, 0, 0)
    assert chat.prompt(asked, 24) == (whole[len(whole) - (SHORT - 24) :], 0, len(whole) - (SHORT - 24))


def test_a_text_loses_its_oldest_tokens(chat: PromptEncoder) -> None:
    whole = [chat.tokenizer.bos_id, *chat.tokenizer.encode("头晕，" * 200)]
    begun = chat.prompt("头晕，" * 200, 24)
    assert begun.ids == whole[-(SHORT - 24) :] and begun.cut == len(whole) - (SHORT - 24)


def test_fits_says_whether_anything_is_lost(chat: PromptEncoder) -> None:
    for prompt in ("头晕，" * 9, (Message("user", "头晕，" * 9),)):
        size = len(chat.prompt(prompt, 1).ids)
        assert chat.fits(prompt, SHORT - size) and not chat.fits(prompt, SHORT - size + 1)


def test_what_cannot_be_asked_is_said_with_its_reason(chat: PromptEncoder, model: ModelRespondent) -> None:
    with pytest.raises(ConversationError, match="the option '' is empty"):
        chat.pair("头晕", ["A", ""])
    with pytest.raises(ConversationError, match="tokens of a context of 96"):
        chat.pair("头晕", ["A" * 200])
    with pytest.raises(InputError, match=r"question/7 cannot be asked: the option '' is empty\. Mend the task's file"):
        model.respond([Choose("question/7", "头晕", ("",))])
    with pytest.raises(InputError, match=r"stores no chat template\. Ask with prompting=plain"):
        model.respond([Choose("question/7", (Message("user", "头晕"),), ("A",))])
