"""Scoring: what the training forward says of prefix and continuation together, with each prefix computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import scoring
from model.batch import IGNORE, PackedBatch
from model.errors import InputError
from model.generate import Generator, Request
from model.heads import CausalLM
from model.sampling import SamplingOptions
from model.scoring import score
from tests.model.tiny import CONFIGS, causal_lm

VOCABULARY = 131


@cache
def model(name: str) -> CausalLM:
    """With weights large enough that it is sure of something, and that positions matter."""
    made = causal_lm(CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return made


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def cases(lengths: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Random prefixes of these lengths, each with random continuations of these lengths."""
    prefixes = [ids(length, seed) for seed, (length, _) in enumerate(lengths)]
    return prefixes, [[ids(length, 100 * at + length) for length in own] for at, (_, own) in enumerate(lengths)]


def document(tokens: Sequence[int]) -> PackedBatch:
    return PackedBatch(
        tokens=torch.tensor(tokens),
        positions=torch.arange(len(tokens)),
        cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
        targets=torch.tensor([*tokens[1:], IGNORE]),
        num_documents=1,
        max_seqlen=len(tokens),
    )


def trained(of: CausalLM, prefix: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """What the training forward gives for the tokens of the continuation."""
    with torch.no_grad():
        return of(document([*prefix, *continuation])).logprob[len(prefix) - 1 : -1]


@contextmanager
def passes(of: CausalLM) -> Iterator[list[Tensor]]:
    """The tokens of every forward pass."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])

    handle = of.model.embed_tokens.register_forward_pre_hook(watch)
    try:
        yield seen
    finally:
        handle.remove()


RAGGED = [(5, [1, 4, 9]), (1, [3]), (20, [1, 2, 1, 30]), (7, []), (40, [1, 1, 1, 1])]


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_the_training_forward(name: str) -> None:
    """Every token, in fp32 to 1e-5: grouped heads, windows, biases, norms of heads, all rotary scalings."""
    prefixes, continuations = cases(RAGGED)
    scores = score(model(name), prefixes, continuations)
    assert [[len(one.logprobs) for one in own] for own in scores] == [list(own) for _, own in RAGGED]
    seen = []
    for prefix, own, given_scores in zip(prefixes, continuations, scores, strict=True):
        for continuation, (logprobs, is_greedy) in zip(own, given_scores, strict=True):
            expected = trained(model(name), prefix, continuation)
            torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-5)
            assert is_greedy is None
            seen.append(expected)
    assert torch.cat(seen).std() > 0.5  # the model is sure of something


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 7), max_size=5)), max_size=5),
    st.integers(1, 60),
    st.sampled_from(["llama", "mistral", "qwen2 with a window"]),
)
def test_budgets_cut_the_work_and_change_nothing(lengths: list[Any], token_budget: int, name: str) -> None:
    prefixes, continuations = cases(lengths)
    with passes(model(name)) as seen:
        scores = score(model(name), prefixes, continuations, token_budget=token_budget, with_greedy=True)
    whole = score(model(name), prefixes, continuations, with_greedy=True)
    for own, same in zip(scores, whole, strict=True):
        for one, other in zip(own, same, strict=True):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-5)
            assert one.is_greedy == other.is_greedy
    largest = max((length + size - 1 for length, own in lengths for size in own), default=0)
    limit = max(token_budget, largest, 2 * max((length for length, own in lengths if own), default=0))
    assert all(len(tokens) <= limit for tokens in seen)


def test_a_prefix_is_computed_once_and_a_letter_costs_nothing() -> None:
    lengths = [(50, [1, 1, 1, 1, 1]), (30, [4] * 7)]
    with passes(model("llama")) as seen:
        score(model("llama"), *cases(lengths))
    assert [len(tokens) for tokens in seen] == [50 + 30 + 7 * 3]


def test_a_long_prefix_is_computed_again_for_as_many_tokens_as_it_has() -> None:
    with passes(model("llama")) as seen:
        score(model("llama"), *cases([(20, [6] * 10)]), token_budget=8)
    assert [len(tokens) for tokens in seen] == [40, 40, 30]  # 4 + 4 + 2 continuations, 5 tokens of each


def test_block_tables_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [(40, [2] * 30)]
    expected = score(model("llama"), *cases(lengths))
    monkeypatch.setattr(scoring, "TABLE_ENTRIES", 10 * 42)
    with passes(model("llama")) as seen:
        assert score(model("llama"), *cases(lengths)) == expected
    assert [len(tokens) - 40 for tokens in seen] == [9, 9, 9, 3]


def test_prefixes_of_a_pass_are_about_as_long() -> None:
    lengths = [(length, [1]) for length in (3, 31, 16, 30, 4, 15)]
    with passes(model("llama")) as seen:
        score(model("llama"), *cases(lengths), token_budget=62)
    assert [len(tokens) for tokens in seen] == [31 + 30, 16 + 15 + 4 + 3]


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_greedy_says_whether_every_token_is_the_likeliest(name: str) -> None:
    prefix, steps = ids(6, 0), 5
    greedy = list(prefix)
    with torch.no_grad():
        for _ in range(steps):
            one = document(greedy)
            hidden = model(name).model(one.tokens, one.positions, one.layout)[-1]
            greedy.append(int((hidden @ model(name).head_weight.t()).argmax()))
    answer = greedy[len(prefix) :]
    changed = [[*answer[:at], (token + 1) % VOCABULARY, *answer[at + 1 :]] for at, token in enumerate(answer)]
    scores = score(model(name), [prefix, prefix], [[answer, answer[:2], *changed], [[answer[0]]]], with_greedy=True)
    assert [[one.is_greedy for one in own] for own in scores] == [[True, True, *[False] * steps], [True]]


@pytest.mark.parametrize(
    ("prefixes", "continuations", "message"),
    [
        ([[1]], [], "1 prefixes have 0 lists"),
        ([[1], []], [[[1]], [[1]]], "prefix 1: the prefix is empty"),
        ([[1]], [[[1], []]], "prefix 0: the continuation of it is empty"),
        ([[1] * 60], [[[1], [1] * 6]], "prefix 0: 65 tokens .* context is 64"),
        ([[1]], [[[1]] * 2 + [[131]]], "prefix 0: ids from 1 to 131; the model knows 0 to 130"),
        ([[-1]], [[[1]]], "ids from -1 to 1"),
    ],
)
def test_what_cannot_be_scored_is_named(prefixes: Any, continuations: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(model("llama"), prefixes, continuations)


def test_the_last_token_may_stand_just_past_the_context() -> None:
    """It is predicted, never read."""
    prefix, continuation = ids(60, 1), ids(5, 2)
    [[(logprobs, _)]] = score(model("llama"), [prefix], [[continuation]])
    expected = trained(model("llama"), prefix, continuation[:-1])
    torch.testing.assert_close(torch.tensor(logprobs[:-1]), expected, rtol=0, atol=1e-5)


def test_nothing_to_score_is_nothing() -> None:
    assert score(model("llama"), [], []) == [] and score(model("llama"), [[1]], [[]]) == [[]]


def test_a_generator_scores_with_its_own_weights_while_it_answers() -> None:
    generator = Generator(CONFIGS["llama"], device="cpu", max_rows=2)
    generator.load((name, parameter.detach()) for name, parameter in model("llama").named_parameters())
    request = Request(ids(9, 3), SamplingOptions(max_new_tokens=8), seed=4)
    [alone] = generator.generate([request])
    generator.add(request)
    events = generator.step()
    prefixes, continuations = cases(RAGGED)
    scores = generator.score([*prefixes, request.prompt], [*continuations, [alone.ids]])
    while not generator.is_idle:
        events += generator.step()
    expected = score(model("llama"), prefixes, continuations)
    assert scores[:-1] == [[one.logprobs for one in own] for own in expected]
    # Rollout and scoring agree about what was drawn, and the answer went on as if nothing had been asked.
    torch.testing.assert_close(torch.tensor(scores[-1][0]), torch.tensor(alone.logprobs), rtol=0, atol=1e-5)
    assert [event.id for event in events] == alone.ids
