"""How a conversation is shown before a run."""

from __future__ import annotations

import pytest

from engine.preview import show_ids
from model.tokenizer import Tokenizer
from tests.small_base import write_small_base


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_small_base(tmp_path_factory.mktemp("base") / "base"))


def shown(prompt: list[int], answer: list[int], tokenizer: Tokenizer, most_tokens: int) -> str:
    return show_ids([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), tokenizer, most_tokens)


def test_trained_tokens_are_marked_and_special_ones_named(tokenizer: Tokenizer) -> None:
    prompt, answer = tokenizer.encode("头晕"), [*tokenizer.encode("休息"), tokenizer.eos_id]
    assert shown(prompt, answer, tokenizer, len(prompt + answer)) == "头晕⟦休息<eos>⟧"


@pytest.mark.parametrize(("questions", "answers"), [(100, 1), (1, 100)])
def test_a_long_conversation_shows_how_it_begins_and_how_its_answer_ends(
    questions: int, answers: int, tokenizer: Tokenizer
) -> None:
    prompt, answer = tokenizer.encode("头晕" * questions), [*tokenizer.encode("休息" * answers), tokenizer.eos_id]
    page = shown(prompt, answer, tokenizer, 60)
    assert page.startswith("头晕") and page.endswith("休息<eos>⟧")
    assert f" … {len(prompt) + len(answer) - 60} tokens more … " in page
