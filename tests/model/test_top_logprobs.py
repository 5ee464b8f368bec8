"""The likeliest tokens of every place: what scoring every token of the vocabulary there says."""

from __future__ import annotations

import pytest

from model.errors import InputError
from model.scoring import score
from model.top_logprobs import top_logprobs
from tests.model.test_scoring import VOCABULARY, ids, model


@pytest.mark.parametrize("name", ["llama", "mistral", "tied"])
def test_the_likeliest_tokens_and_a_texts_own_are_those_of_scoring(name: str) -> None:
    text, start = ids(12, 3), 4
    found = top_logprobs(model(name), text, start, 3)
    assert len(found) == len(text) - start
    prefixes = [text[:place] for place in range(start, len(text))]
    every = [[[token] for token in range(VOCABULARY)]] * len(prefixes)
    for token, one, scores in zip(text[start:], found, score(model(name), prefixes, every), strict=True):
        expected = [each.logprobs[0] for each in scores]
        assert one.logprob == pytest.approx(expected[token], abs=1e-5)
        likeliest = sorted(range(VOCABULARY), key=lambda token: -expected[token])[:3]
        assert [token for token, _ in one.top] == likeliest
        assert [value for _, value in one.top] == pytest.approx([expected[token] for token in likeliest], abs=1e-5)


def test_nothing_behind_the_start_is_nothing() -> None:
    assert top_logprobs(model("llama"), [5, 6], 2, 1) == []


@pytest.mark.parametrize(
    ("text", "start", "count", "message"),
    [
        ([5], 0, 1, "start is 0 in a text of 1 tokens."),
        ([5, 6], 3, 1, "start is 3 in a text of 2 tokens."),
        ([5, 6], 1, VOCABULARY + 1, "count is 132."),
        ([5] * 65, 1, 1, "The text has 65 tokens, the context is 64."),
        ([5, VOCABULARY], 1, 1, "ids outside 0 to 130"),
    ],
)
def test_what_cannot_be_scored_is_named(text: list[int], start: int, count: int, message: str) -> None:
    with pytest.raises(InputError) as refused:
        top_logprobs(model("llama"), text, start, count)
    assert message in str(refused.value)
