"""Common beginnings of prefixes: computed once in a pass, and what comes out is what each would give by itself."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model import shared_prefixes
from model.hf import write_model
from model.scoring import score
from model.shared_prefixes import LEAST_SHARED, pack, plan_passes
from tests.model.test_scoring import VOCABULARY, ids, model, passes, trained
from tests.model.tiny import CONFIGS

Asked = tuple[list[list[int]], list[list[list[int]]]]


def random_tree(seed: int, context: int = 60) -> Asked:
    """Prefixes that grow out of each other, some of them twice, some of them the beginning of others; continuations
    that are other prefixes' ends and beginnings; in any order."""
    draw = random.Random(seed)
    prefixes = [[1]]
    while len(prefixes) < 12:
        parent = draw.choice(prefixes)
        kept = parent[: draw.randrange(len(parent) + 1)]
        prefixes.append((kept + draw.choices(range(VOCABULARY), k=draw.randrange(1, 25)))[: context - 8])
    prefixes += draw.choices(prefixes, k=3)
    draw.shuffle(prefixes)
    continuations: list[list[list[int]]] = []
    for prefix in prefixes:
        longer = [other[len(prefix) :][:9] for other in prefixes if other[: len(prefix)] == prefix]
        others = [other[: draw.randrange(1, 9)] for other in draw.sample(prefixes, 2)]
        continuations.append([one for one in draw.sample([*longer, *others], draw.randrange(3)) if one])
    return prefixes, continuations


def check(name: str, asked: Asked, token_budget: int = 8192) -> None:
    """Every score against the training forward over its prefix and continuation alone."""
    scores = score(model(name), *asked, token_budget=token_budget)
    for prefix, continuations, given in zip(*asked, scores, strict=True):
        assert len(given) == len(continuations)
        for continuation, one in zip(continuations, given, strict=True):
            expected = trained(model(name), prefix, continuation)
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2 with a window", "qwen3", "llama3"])
@pytest.mark.parametrize("least", [1, LEAST_SHARED])
def test_random_trees_score_as_each_text_by_itself(name: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "LEAST_SHARED", least)
    for seed in range(6):
        check(name, random_tree(seed), token_budget=(8192, 90, 20)[seed % 3])


def test_random_trees_score_as_transformers_scores_each_text(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = model("llama")
    weights = ((name, parameter.detach()) for name, parameter in ours.named_parameters())
    write_model(tmp_path, CONFIGS["llama"], weights, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prefixes, continuations = random_tree(7)
    for prefix, own, given in zip(prefixes, continuations, score(ours, prefixes, continuations), strict=True):
        for continuation, one in zip(own, given, strict=True):
            with torch.no_grad():
                logprobs = theirs(torch.tensor([prefix + continuation])).logits[0].log_softmax(dim=-1)
            wanted = logprobs[range(len(prefix) - 1, len(prefix) + len(continuation) - 1), continuation]
            torch.testing.assert_close(torch.tensor(one.logprobs), wanted, rtol=0, atol=1e-5)


def count(asked: Asked) -> list[int]:
    """Tokens of each pass."""
    with passes(model("llama")) as seen:
        score(model("llama"), *asked)
    return [len(tokens) for tokens in seen]


LETTERS = [[3], [4], [5], [6]]


def test_exemplars_are_computed_once_and_questions_once() -> None:
    exemplars = ids(30, 0)
    questions = [ids(length, length) for length in (11, 7, 9)]
    assert count(([exemplars + question for question in questions], [LETTERS] * 3)) == [30 + 11 + 7 + 9]


def test_branches_share_with_the_branch_that_they_grow_from() -> None:
    root, left, right = ids(20, 0), ids(8, 1), ids(9, 2)
    texts = [root + left + ids(3, 3), root + right + ids(4, 4), root + left + ids(5, 5), root + right]
    assert count((texts, [LETTERS] * 4)) == [20 + (8 + 3 + 5) + (9 + 4)]


def test_a_prefix_asked_twice_is_computed_once() -> None:
    prefix = ids(20, 0)
    assert count(([prefix, ids(30, 1), prefix], [[[1, 2]], [[1]], [[3, 4, 5]]])) == [30 + 20 + 1 + 2]


def test_a_prefix_that_another_begins_with_is_computed_with_it() -> None:
    prefix = ids(30, 0)
    check("llama", ([prefix, prefix[:20]], [[[1, 2]], [prefix[20:25]]]))
    assert count(([prefix, prefix[:20]], [[[1, 2]], [prefix[20:25]]])) == [30 + 1 + 4]


def test_a_beginning_that_all_texts_have_is_not_worth_their_order() -> None:
    """Prefixes that share less stand by length, whatever their first tokens are."""
    for shared, order in ((LEAST_SHARED - 1, [2, 0, 3, 1]), (LEAST_SHARED, [0, 1, 2, 3])):
        texts = [ids(shared, 0) + [at] * length for at, length in enumerate((20, 10, 30, 15))]
        [branches] = plan_passes(texts, [LETTERS] * 4, 8192, 1 << 24)
        assert [branch.prefix for branch in branches] == order
        assert [branch.shared for branch in branches] == [0, *[shared if shared >= LEAST_SHARED else 0] * 3]


def test_a_beginning_is_computed_again_in_every_pass() -> None:
    exemplars, questions = ids(30, 0), [ids(10, seed) for seed in range(1, 7)]
    with passes(model("llama")) as seen:
        score(model("llama"), [exemplars + one for one in questions], [LETTERS] * 6, token_budget=80)
    assert [len(tokens) for tokens in seen] == [30 + 50, 30 + 10]


def test_what_else_is_asked_changes_rounding_alone() -> None:
    prefixes, continuations = random_tree(3)
    together = score(model("llama"), prefixes, continuations)
    for prefix, own, expected in zip(prefixes, continuations, together, strict=True):
        [alone] = score(model("llama"), [prefix], [own])
        for one, other in zip(alone, expected, strict=True):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-5)


def test_shared_prefixes_may_fill_the_context() -> None:
    exemplars = ids(40, 0)
    texts = [exemplars + ids(24, 1), exemplars + ids(20, 2), exemplars + ids(23, 3)]  # the context is 64
    scores = score(model("llama"), texts, [[[7]], [ids(5, 4)], [[8, 9]]])
    for text, continuation, [(logprobs, _)] in zip(texts, [[7], ids(5, 4), [8, 9]], scores, strict=True):
        expected = trained(model("llama"), text, continuation[:-1]) if len(continuation) > 1 else torch.empty(0)
        torch.testing.assert_close(torch.tensor(logprobs[:-1]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("budget", "entries"), [(150, 1 << 24), (400, 900), (8192, 2000), (8192, 1 << 24)])
def test_every_continuation_is_in_one_pass_and_passes_keep_their_bounds(budget: int, entries: int) -> None:
    trees = [random_tree(100 + at) for at in range(8)]
    prefixes = [prefix for tree in trees for prefix in tree[0]]
    continuations = [own for tree in trees for own in tree[1]]
    asked: list[tuple[int, int]] = []
    for branches in plan_passes(prefixes, continuations, budget, entries):
        packed = pack(branches, prefixes, continuations)
        asked += [(branch.prefix, index) for branch in branches for index in branch.continuations]
        assert len(packed.tokens) <= max(budget, 2 * max(len(prefixes[branch.prefix]) for branch in branches))
        assert packed.table.numel() <= entries
        for keys, length in zip(packed.table, packed.layout.cu_seqlens_k.diff().tolist(), strict=True):
            assert packed.positions[keys[:length].long()].tolist() == list(range(length))
    assert sorted(asked) == [(at, index) for at, own in enumerate(continuations) for index in range(len(own))]


def test_many_requests_are_arranged_in_little_memory() -> None:
    """Beside the requests themselves: 4 bytes a token, and some hundred a request; one pass at a time is packed."""
    exemplars = [ids(60, seed) for seed in range(10)]
    prefixes = [exemplars[at % 10] + ids(20, 1000 + at) for at in range(1500)]
    continuations: Sequence[list[list[int]]] = [LETTERS] * len(prefixes)
    tracemalloc.start()
    try:
        tokens = sum(
            len(pack(branches, prefixes, continuations).tokens)
            for branches in plan_passes(prefixes, continuations, 8192, 1 << 24)
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tokens <= 1500 * 20 + 60 * (10 + 1500 * 20 // 8000)
    assert peak < (4 * 80 + 500) * 1500 + (6 << 20)
