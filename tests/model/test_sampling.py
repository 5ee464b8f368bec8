"""Choosing tokens: which are kept, how often each is drawn, and rows that mind their own business."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import sampling
from model.errors import InputError
from model.sampling import Filters, SamplingOptions, TokenChooser, least_kept, penalise, row_seed
from tests.kernels.oracle import random
from tests.kernels.test_sample import assert_follows
from tests.no_values import DEVICE, Watch, watched

PLAIN = SamplingOptions()
GREEDY = SamplingOptions(temperature=0)
MIXED = [
    PLAIN,
    GREEDY,
    SamplingOptions(temperature=0.7),
    SamplingOptions(top_k=5),
    SamplingOptions(temperature=1.3, top_p=0.8),
    SamplingOptions(min_p=0.05),
    SamplingOptions(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
    SamplingOptions(temperature=0, repetition_penalty=1.1),
]


def described(options: SamplingOptions) -> str:
    """What differs from plain sampling, for the names of tests."""
    values = vars(options).items()
    return ", ".join(f"{name} {value}" for name, value in values if value != getattr(PLAIN, name)) or "plain"


def seated(vocab: int, options: Sequence[SamplingOptions], seeds: Sequence[int] = ()) -> TokenChooser:
    """A chooser with these rows, in places of their order."""
    chooser = TokenChooser(len(options), vocab)
    for row, option in enumerate(options):
        chooser.seat(row, option, seeds[row] if seeds else row)
    return chooser


# Which tokens are kept.


def kept(x: Tensor, options: SamplingOptions, filters: Filters | None = None) -> Tensor:
    """bool [V]: what a chooser keeps of one row, doing what it has to do or, to compare, more."""
    top_k = torch.tensor([[min(options.top_k or len(x), len(x))]])
    numbers = torch.tensor([options.temperature, options.top_p, options.min_p], dtype=torch.float64)
    temperature, top_p, min_p = numbers.view(3, 1, 1)
    filters = filters or seated(len(x), [options]).filters
    if not filters.ranked:
        return x > -math.inf
    return (x >= least_kept(x[None], temperature.float(), top_k, top_p, min_p, filters)[0]) & (x > -math.inf)


def definition(x: Tensor, options: SamplingOptions, margin: float) -> tuple[Tensor, Tensor]:
    """(tokens that must be kept, tokens that may be), in float64, from what is written about top-k, top-p and min-p.

    They differ where a sum or a ratio is closer to its limit than `margin`, and rounding may decide.
    """
    x = x.double() / options.temperature
    kth = x.sort(descending=True).values[min(options.top_k or len(x), len(x)) - 1]
    p = x.masked_fill(x < kth, -math.inf).softmax(0)
    above = torch.stack([p[x > value].sum() for value in x])
    ratio = (x - x.max()).exp()

    def keep(top_p: float, min_p: float) -> Tensor:
        in_nucleus = (above < top_p) | (options.top_p == 1)
        return (x >= kth) & in_nucleus & (ratio >= min_p) & (x > -math.inf)

    # Nothing lies between the likeliest and min_p = 1, and at 0 nothing is too small: there no margin is needed.
    slack = margin if 0 < options.min_p < 1 else 0
    return keep(options.top_p - margin, options.min_p + slack), keep(options.top_p + margin, options.min_p - slack)


def transformers_kept(x: Tensor, options: SamplingOptions) -> Tensor:
    from transformers.generation import logits_process as hf

    scores = x[None] / options.temperature
    if options.top_k:
        scores = hf.TopKLogitsWarper(options.top_k)(None, scores)
    if options.top_p < 1:
        scores = hf.TopPLogitsWarper(options.top_p)(None, scores)
    if options.min_p:
        scores = hf.MinPLogitsWarper(options.min_p)(None, scores)
    return scores[0] > -math.inf


# Multiples of 1/8 tie often, and stay distinct when divided by a temperature; far ones underflow.
grid = st.integers(-80, 80).map(lambda n: n / 8)
logit = st.one_of(grid, grid, st.sampled_from([0.0, 1e4, -1e4, -math.inf]))
lists = st.lists(logit) | st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=8)
rows = st.builds(lambda x, at, top: torch.tensor([*x[:at], top, *x[at:]]), lists, st.integers(0, 20), grid)
filters = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 12) | st.just(10**6),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.01, 0.3, 1.0]),
)


@settings(max_examples=600, derandomize=True, deadline=None)
@given(rows, filters)
def test_kept_sets_are_those_of_the_definition(x: Tensor, options: SamplingOptions) -> None:
    must, may = definition(x, options, margin=1e-9)
    ours = kept(x, options)
    assert (ours | ~must).all() and (may | ~ours).all() and ours[x.argmax()]


@settings(max_examples=600, derandomize=True, deadline=None)
@given(rows, filters)
def test_kept_sets_are_those_of_transformers(x: Tensor, options: SamplingOptions) -> None:
    """But where fp32 sums decide, and among tokens as likely as the last one kept, of which it may keep a part."""
    must, may = definition(x, options, margin=1e-5)
    ours, theirs = kept(x, options), transformers_kept(x, options)
    last = x == x[ours].min()
    differ = ours != theirs
    assert not (differ & (must | ~may) & ~last).any()
    if options.top_p == 1 and torch.equal(must, may):
        assert not differ.any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(top_k=50),
        SamplingOptions(top_p=0.9),
        SamplingOptions(temperature=0.7, top_p=0.95, min_p=0.01),
        SamplingOptions(temperature=1.5, top_k=200, top_p=0.8, min_p=0.001),
        SamplingOptions(temperature=50.0, top_p=0.7),
        SamplingOptions(temperature=50.0, top_k=5000, top_p=0.7),
    ],
    ids=described,
)
def test_kept_sets_are_those_of_transformers_over_a_vocabulary(options: SamplingOptions, seed: int) -> None:
    x = 4 * random(20000, seed=seed).cpu()
    assert torch.equal(kept(x, options), transformers_kept(x, options))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(rows, filters, st.integers(1, 9))
def test_how_deeply_logits_are_ranked_changes_nothing(x: Tensor, options: SamplingOptions, first: int) -> None:
    whole = kept(x, options, Filters(ranked=len(x), has_top_p=True))
    with patch.object(sampling, "FIRST_RANKED", first):
        assert torch.equal(kept(x, options), whole)
        assert torch.equal(kept(x, options, Filters(ranked=len(x), has_top_p=True)), whole)


def test_ties_stay_together() -> None:
    x = torch.tensor([1.0, 0, 2, 0, 0, -1])
    assert kept(x, SamplingOptions(top_k=3)).tolist() == [True, True, True, True, True, False]
    mass_above = x.softmax(0)[[0, 2]].sum().item()
    for top_p, tied in (mass_above - 1e-4, False), (mass_above + 1e-4, True):
        assert kept(x, SamplingOptions(top_p=top_p)).tolist() == [True, tied, True, tied, tied, False]
    # Ties of the k-th that are not ranked count among what top-p is a share of: e^2 of e^2 + 10 lies above them.
    x = torch.tensor([2.0] + [0] * 10)
    assert (
        kept(x, SamplingOptions(top_k=2, top_p=0.5)).all() and kept(x, SamplingOptions(top_k=2, top_p=0.4)).sum() == 1
    )


# How often each is drawn. As in tests/kernels/test_sample.py: seeds are fixed, one correct sampler in a million fails.

VOCABULARY = 37
ROWS = 2**9


def drawn(logits: Tensor, options: SamplingOptions, steps: int = 32) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities [steps, ROWS], every row with a seed of its own."""
    chooser = seated(len(logits), [options] * ROWS, [row_seed(2, row) for row in range(ROWS)])
    chosen = [chooser.choose(logits.expand(ROWS, -1)) for _ in range(steps)]
    return torch.stack([token for token, _ in chosen]), torch.stack([logprob for _, logprob in chosen])


def stated(tokens: Tensor, logprobs: Tensor) -> Tensor:
    """[V]: the probability that came with each token, NaN for those that never came; it is one for each."""
    table = torch.full((VOCABULARY,), math.nan)
    table[tokens.flatten()] = logprobs.flatten()
    assert torch.equal(table[tokens], logprobs)
    return table.exp()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        SamplingOptions(top_k=9),
        SamplingOptions(top_p=0.8),
        SamplingOptions(min_p=0.1),
        SamplingOptions(top_k=20, top_p=0.9, min_p=0.05),
    ],
    ids=described,
)
def test_tokens_follow_the_stated_probabilities(options: SamplingOptions, temperature: float) -> None:
    """Those of the whole vocabulary, or, with filters, these over what is kept."""
    logits = 1.5 * random(VOCABULARY, seed=5).cpu()
    options = replace(options, temperature=temperature)
    tokens, logprobs = drawn(logits, options)
    probabilities = stated(tokens, logprobs)
    expected = (logits.double() / temperature).softmax(0)
    torch.testing.assert_close(probabilities.double(), expected.where(~probabilities.isnan(), math.nan), equal_nan=True)
    expected = probabilities.where(~probabilities.isnan(), expected).where(kept(logits, options), 0).double()
    assert_follows(tokens.flatten().bincount(minlength=VOCABULARY), expected / expected.sum())


def test_penalised_tokens_follow_the_penalised_softmax() -> None:
    logits = 1.5 * random(VOCABULARY, seed=6).cpu()
    options, seen = SamplingOptions(temperature=1.3, repetition_penalty=2.0), [3, 5, 5, 30, 31]
    chooser = TokenChooser(2**12, VOCABULARY)
    for row in range(2**12):
        chooser.seat(row, options, row_seed(3, row), seen)
    tokens, logprobs = chooser.choose(logits.expand(2**12, -1))
    is_seen = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, torch.tensor(seen), True)
    penalised = logits.where(~is_seen, (logits * 2).where(logits < 0, logits / 2))
    assert_follows(tokens.bincount(minlength=VOCABULARY), (penalised.double() / 1.3).softmax(0))
    # The log-probability is the model's all the same.
    torch.testing.assert_close(logprobs, (logits / 1.3).log_softmax(0)[tokens])


@pytest.mark.parametrize("options", [PLAIN, SamplingOptions(top_k=7)], ids=described)
def test_steps_and_seeds_are_independent(options: SamplingOptions) -> None:
    logits = random(8, seed=4).cpu()
    tokens, _ = drawn(logits, options, steps=64)
    p = logits.double().where(kept(logits, options), -math.inf).softmax(0)
    for one, other in ((tokens[:-1], tokens[1:]), (tokens[:, :-1], tokens[:, 1:])):
        assert_follows((one * 8 + other).flatten().bincount(minlength=64), torch.outer(p, p).flatten())


# Rows that mind their own business.


@pytest.mark.parametrize("options", MIXED, ids=described)
def test_a_row_draws_what_it_draws_alone(options: SamplingOptions) -> None:
    """Bitwise, wherever it sits, whoever sits beside it, and in whichever order they are asked."""
    steps = [random(len(MIXED) + 1, 700, seed=seed).cpu() for seed in range(3)]
    alone = TokenChooser(1, 700)
    alone.seat(0, options, 11, [1, 2, 3])
    expected = [alone.choose(logits[-1:]) for logits in steps]

    among = TokenChooser(12, 700)
    for row, other in enumerate(MIXED):
        among.seat(row + 2, other, row, [row, row + 9])
    among.seat(1, options, 11, [1, 2, 3])
    places = torch.tensor([4, 3, 9, 1, 8, 2, 5, 6, 7])
    for logits, (token, logprob) in zip(steps, expected, strict=True):
        tokens, logprobs = among.choose(logits[[0, 1, 2, -1, 4, 5, 6, 7, 3]], places)
        assert tokens[3] == token[0] and logprobs[3] == logprob[0]


@pytest.mark.parametrize("options", MIXED, ids=described)
def test_a_row_that_had_to_leave_goes_on_as_it_would_have(options: SamplingOptions) -> None:
    steps = [random(1, 700, seed=seed).cpu() for seed in range(6)]
    chooser = TokenChooser(3, 700)
    chooser.seat(0, options, 5, [1, 2])
    whole = [chooser.choose(logits)[0].item() for logits in steps]
    chooser.seat(1, options, 5, [1, 2])
    begun = [chooser.choose(logits, torch.tensor([1]))[0].item() for logits in steps[:2]]
    chooser.leave(1)
    chooser.seat(1, MIXED[-2], 6, [3])
    chooser.choose(steps[0], torch.tensor([1]))
    chooser.seat(2, options, 5, [1, 2, *begun], step=2)
    rest = [chooser.choose(logits, torch.tensor([2]))[0].item() for logits in steps[2:]]
    assert begun + rest == whole


def test_a_place_forgets_who_sat_there() -> None:
    logits = random(1, 50).cpu()
    options = SamplingOptions(temperature=0, repetition_penalty=100.0)
    chooser = TokenChooser(1, 50)
    chooser.seat(0, options, 0, [logits.argmax().item()])
    assert chooser.choose(logits)[0] != logits.argmax()
    chooser.seat(0, options, 0)
    assert chooser.choose(logits)[0] == logits.argmax()


def test_samples_of_one_prompt_draw_apart_from_one_row_of_logits() -> None:
    logits = random(1, 5000).cpu()
    tokens, _ = seated(5000, [PLAIN] * 8, [row_seed(0, sample) for sample in range(8)]).choose(logits.expand(8, -1))
    assert len(set(tokens.tolist())) > 4


def test_row_seeds_are_64_bits_and_differ() -> None:
    seeds = {row_seed(seed, sample) for seed in range(-50, 50) for sample in range(50)}
    assert len(seeds) == 5000 and all(-(2**63) <= seed < 2**63 for seed in seeds) and min(seeds) < 0
    # What a seed means must never change: answers that were published with it could not be had again.
    assert (row_seed(0, 0), row_seed(42, 7)) == (7358642676132404131, 7424265224189541367)


# Greedy rows, penalties, and rows without a distribution.


def test_greedy_takes_the_first_of_the_likeliest_and_states_the_untempered_probability() -> None:
    logits = random(3, 900).cpu()
    logits[1, [17, 600]] = 9
    for others in ([], [SamplingOptions(top_p=0.5)]):
        tokens, logprobs = seated(900, [GREEDY, replace(GREEDY, top_k=3, min_p=0.3), *others, PLAIN]).choose(logits)
        assert tokens[:2].tolist() == [logits[0].argmax(), 17]
        torch.testing.assert_close(logprobs[:2], logits[:2].log_softmax(1).amax(1))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(rows, st.lists(st.integers(0, 20)), st.sampled_from([0.5, 1.0, 1.2, 7.0]))
def test_the_penalty_is_that_of_transformers(x: Tensor, ids: list[int], penalty: float) -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    ids = [index % len(x) for index in ids]
    is_seen = torch.zeros(1, len(x), dtype=torch.bool).index_fill(1, torch.tensor(ids, dtype=torch.int64), True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids], dtype=torch.int64), x[None].clone())
    assert torch.equal(penalise(x[None], is_seen, torch.tensor([[penalty]])), expected)


def test_prompt_and_answer_are_penalised_as_in_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    prompts, penalty = [[1, 2, 2, 7], [3], []], 1.4
    chooser = TokenChooser(3, 12)
    for row, prompt in enumerate(prompts):
        chooser.seat(row, SamplingOptions(temperature=0, repetition_penalty=penalty), 0, prompt)
    ids = [list(prompt) for prompt in prompts]
    for step in range(20):
        logits = random(3, 12, seed=step).cpu()
        tokens, logprobs = chooser.choose(logits)
        for row, answer in enumerate(ids):
            seen = torch.tensor([answer], dtype=torch.int64)
            scores = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits[row : row + 1].clone())
            assert tokens[row] == scores.argmax()
            answer.append(tokens[row].item())
        torch.testing.assert_close(logprobs, logits.log_softmax(1).gather(1, tokens[:, None])[:, 0])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_without_a_distribution_gives_token_0_and_nan_and_harms_nobody() -> None:
    options = [SamplingOptions(top_k=3, top_p=0.9), SamplingOptions(top_p=0.5, min_p=0.1, repetition_penalty=2.0)] * 2
    logits = random(4, 60).cpu()
    expected = seated(60, options).choose(logits)
    logits[0, 7], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    tokens, logprobs = seated(60, options).choose(logits)
    assert tokens[:3].tolist() == [0, 0, 0] and logprobs[:3].isnan().all()
    assert tokens[3] == expected[0][3] and logprobs[3] == expected[1][3]


# What it costs.


def test_rows_without_filters_are_drawn_by_the_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random(3, 300).cpu()
    options = [PLAIN, SamplingOptions(temperature=0.5), SamplingOptions(temperature=0, top_k=4, top_p=0.1)]
    monkeypatch.setattr(sampling, "least_kept", None)
    monkeypatch.setattr(torch.Tensor, "topk", None)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    tokens, logprobs = seated(300, options).choose(logits)
    drawn = sampling.sample(logits, torch.tensor([1, 0.5, 0]), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(tokens, drawn[0]) and torch.equal(logprobs, drawn[1])


def test_logits_are_ranked_no_deeper_than_the_rows_need() -> None:
    chooser = TokenChooser(4, 1000)
    assert chooser.filters == Filters(0, False, False)
    chooser.seat(0, SamplingOptions(min_p=0.1), 0)
    assert chooser.filters == Filters(1, False, False)
    chooser.seat(1, SamplingOptions(top_k=40, top_p=0.9), 0)
    assert chooser.filters == Filters(64, True, False)
    chooser.seat(2, SamplingOptions(top_p=0.9, repetition_penalty=1.1), 0)
    assert chooser.filters == Filters(1000, True, True)
    chooser.leave(2)
    chooser.seat(1, SamplingOptions(top_k=10**9), 0)
    assert chooser.filters == Filters(1, False, False)


def test_a_cpu_ranks_more_only_where_the_border_of_top_p_lies_deeper(monkeypatch: pytest.MonkeyPatch) -> None:
    depths: list[int] = []
    topk = torch.Tensor.topk

    def watched(x: Tensor, k: int, **rest: int) -> Any:
        depths.append(k)
        return topk(x, k, **rest)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    x = random(20000).cpu()
    for temperature, expected in ((0.2, [1024]), (1.0, [1024, 8192])):
        depths.clear()
        kept(x, SamplingOptions(temperature=temperature, top_p=0.9))
        assert depths == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_chosen_from_in_fp32(dtype: torch.dtype) -> None:
    logits = random(len(MIXED), 500).cpu().to(dtype)
    for mine, theirs in zip(seated(500, MIXED).choose(logits), seated(500, MIXED).choose(logits.float()), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


class _Unpinned(Watch):
    """Small copies that do not block may come from any memory: the driver takes their bytes along."""

    def _look_at_copy(self, func: Any, source: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        assert func not in (Tensor.to, Tensor.copy_) or kwargs.get("non_blocking")


def test_nobody_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so a graph can hold the choice: what is copied from the host while one is captured ends the capture."""
    monkeypatch.setattr(sampling, "FIRST_RANKED", 1000)  # a GPU ranks all that it has to at once
    with watched(monkeypatch), _Unpinned(set()):
        chooser = TokenChooser(len(MIXED), 1000, DEVICE)
        for row, option in enumerate(MIXED):
            chooser.seat(row, option, row, [row])
        chooser.choose(torch.empty(len(MIXED), 1000, device=DEVICE))
        chooser.choose(torch.empty(3, 1000, device=DEVICE), torch.empty(3, dtype=torch.int64, device=DEVICE))


# Options.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.2),
        ("max_new_tokens", 0),
        ("stop_ids", 2),
        ("stop_ids", ["</s>"]),
        ("stop_texts", "病人："),
        ("stop_texts", [""]),
    ],
)
def test_an_option_outside_its_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is .*; give "):
        SamplingOptions(**{name: value})


def test_lists_become_tuples() -> None:
    options: Any = SamplingOptions(stop_ids=[2, 7], stop_texts=["。"])  # type: ignore[arg-type]
    assert (options.stop_ids, options.stop_texts) == ((2, 7), ("。",)) and hash(options) == hash(replace(options))
