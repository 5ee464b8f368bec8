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


@pytest.mark.parametrize("most_tokens", range(20, 60))
def test_where_prompt_and_answer_meet_is_seen_and_no_character_is_cut(tokenizer: Tokenizer, most_tokens: int) -> None:
    prompt, answer = tokenizer.encode("郁头晕" * 40), [*tokenizer.encode("鬱休息" * 40), tokenizer.eos_id]
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("鬱")[:-1]), "a character of several tokens"
    page = shown(prompt, answer, tokenizer, most_tokens)
    assert "\ufffd" not in page
    asked, _, answered = page.partition("⟦")
    assert asked.startswith("郁") and asked.endswith("晕") and " tokens more … " in asked
    assert answered.startswith("鬱") and answered.endswith("息<eos>⟧") and " tokens more … " in answered


def test_of_many_turns_the_first_and_the_last_are_shown(tokenizer: Tokenizer) -> None:
    prompt, answer = tokenizer.encode("头晕"), [*tokenizer.encode("休息"), tokenizer.eos_id]
    turns = 50
    page = show_ids([*prompt, *answer] * turns, ([False] * len(prompt) + [True] * len(answer)) * turns, tokenizer, 96)
    assert page.startswith("头晕⟦休息<eos>⟧头晕") and page.endswith("晕⟦休息<eos>⟧")
    assert page.count(" tokens more … ") == 1 and page.count("⟦") == page.count("⟧") == 3


@pytest.mark.parametrize(("questions", "answers"), [(100, 1), (1, 100)])
def test_a_long_conversation_shows_how_it_begins_and_how_its_answer_ends(
    questions: int, answers: int, tokenizer: Tokenizer
) -> None:
    prompt, answer = tokenizer.encode("头晕" * questions), [*tokenizer.encode("休息" * answers), tokenizer.eos_id]
    page = shown(prompt, answer, tokenizer, 60)
    assert page.startswith("头晕") and page.endswith("休息<eos>⟧")
    assert f" … {len(prompt) + len(answer) - 60} tokens more … " in page
