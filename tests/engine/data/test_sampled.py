"""Answers that were sampled are stored, and trained, by the ids that were sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.conversations import ConversationDataConfig, open_conversations
from engine.data.corpus import Corpus
from engine.data.loader import build_batch
from engine.data.packing import Piece
from engine.data.prepare import prepare
from engine.data.sampled import SampledEncoder, SampledOptions
from engine.data.shards import TRAINED
from model.batch import IGNORE
from model.chat import ChatTemplate, Message
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.small_base import write_small_base

QUESTION = [Message("user", "头晕怎么办？")]
CONTEXT = 128


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_small_base(tmp_path_factory.mktemp("base"), CONTEXT))


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate.named("chimed", tokenizer)


def pick(tokenizer: Tokenizer, template: ChatTemplate, answer_ids: list[int], turns: list[Message] = QUESTION) -> dict:
    messages = [*turns, Message("assistant", tokenizer.decode(answer_ids))]
    return {
        "messages": [vars(message) for message in messages],
        "prompt_ids": template.encode_prompt(tokenizer, turns),
        "answer_ids": answer_ids,
    }


def store(folder: Path, rows: list[Any], tokenizer: Tokenizer, template: ChatTemplate, context: int = CONTEXT) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "picks.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    encoder = SampledEncoder(template, tokenizer, context)
    return prepare([path], encoder, folder / "picks", SampledOptions(), workers=1)


def opened(directory: Path, tokenizer: Tokenizer, template: ChatTemplate) -> Corpus:
    config = ConversationDataConfig(paths=[str(directory)])
    return open_conversations(config, template, tokenizer, CONTEXT, directory)


def spelt_apart(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's ids, character by character."""
    return [ids[-1] for character in text if (ids := tokenizer.encode(character))]


def test_the_ids_that_are_trained_are_those_that_were_sampled(
    tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    end = template.end_ids(tokenizer)[0]
    apart = [*spelt_apart(tokenizer, "注意休息"), end]
    row = pick(tokenizer, template, apart)
    messages = [Message(**message) for message in row["messages"]]
    written = template.encode(tokenizer, messages).ids
    assert written != row["prompt_ids"] + apart, "encoding the text again gives other ids, or this proves nothing"
    corpus = opened(store(tmp_path, [row], tokenizer, template), tokenizer, template)
    stored = corpus.read(0)
    assert (stored % TRAINED).tolist() == row["prompt_ids"] + apart
    batch = build_batch(corpus, [Piece(0, 0, 0, len(stored))], 256, CONTEXT)
    begin = len(row["prompt_ids"])
    assert batch.targets[begin - 1 : begin - 1 + len(apart)].tolist() == apart
    assert (batch.targets != IGNORE).sum() == len(apart)


def test_earlier_answers_in_a_prompt_are_not_trained(
    tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    turns = [*QUESTION, Message("assistant", "注意休息。"), Message("user", "发热呢？")]
    row = pick(tokenizer, template, [*tokenizer.encode("多饮水"), tokenizer.eos_id], turns)
    stored = opened(store(tmp_path, [row], tokenizer, template), tokenizer, template).read(0)
    assert np.flatnonzero(stored >= TRAINED)[0] == len(row["prompt_ids"])


def test_the_split_keeps_the_answers_to_one_question_together(
    tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    rows = [
        pick(tokenizer, template, [*tokenizer.encode(answer), tokenizer.eos_id], [Message("user", f"病例{number}？")])
        for number in range(20)
        for answer in ("休息", "运动")
    ]
    corpus = opened(store(tmp_path, rows, tokenizer, template), tokenizer, template)
    train, held_out = corpus.split(0.3)
    questions = [{document // 2 for document in side.documents().tolist()} for side in (train, held_out)]
    assert questions[0] and questions[1] and not questions[0] & questions[1]


def test_what_does_not_fit_the_context_or_has_no_ids_is_refused_with_its_line(
    tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    good = pick(tokenizer, template, [*tokenizer.encode("休息"), tokenizer.eos_id])
    long = {**good, "answer_ids": good["answer_ids"] * 100}
    directory = store(tmp_path, [good, long, {"messages": good["messages"]}], tokenizer, template)
    rejects = [json.loads(line) for line in (directory / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [2, 3]
    assert "more than a context of 128" in rejects[0]["reason"] and "lacks" in rejects[1]["reason"]
    with pytest.raises(InputError, match="Give files that"):
        store(tmp_path / "none", [{"text": "a"}] * 3, tokenizer, template)


def test_picks_of_another_template_or_context_are_not_taken(
    tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    row = pick(tokenizer, template, [*tokenizer.encode("休息"), tokenizer.eos_id])
    directory = store(tmp_path, [row], tokenizer, template)
    with pytest.raises(InputError, match="another chat template"):
        opened(directory, tokenizer, ChatTemplate.named("vicuna", tokenizer))
