"""What is chosen of all samples, against choosing by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from rlhf.selection import Pool, SelectConfig, answer_key, drop_duplicates, select


def pool_of(rows: list[tuple[int, str, float, bool]]) -> Pool:
    """From rows of (prompt, text, score, is_complete)."""
    prompts, texts, scores, complete = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Pool(
        np.array(prompts, np.int64),
        np.array([answer_key(text) for text in texts], np.uint64),
        np.array(scores, np.float32),
        np.array(complete, bool),
    )


# Few prompts, texts and scores, so that there are ties and duplicates in every draw.
ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from("abcdef"), st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.booleans())
)


def by_hand(rows: list[tuple[int, str, float, bool]], config: SelectConfig) -> list[int]:
    """Row by row, as the words of `SelectConfig` say it."""
    usable: list[int] = []
    for row, (prompt, text, _, is_complete) in enumerate(rows):
        is_new = all((rows[other][0], rows[other][1]) != (prompt, text) for other in usable)
        if is_new and (is_complete or config.truncated):
            usable.append(row)

    def best(of: list[int], count: int) -> list[int]:
        taken: list[int] = []
        for _ in range(min(count, len(of))):
            left = [row for row in of if row not in taken]
            highest = max(rows[row][2] for row in left)
            taken.append(next(row for row in left if rows[row][2] == highest))
        return taken

    if config.by == "top":
        return sorted(best(usable, int(config.keep)))
    chosen: list[int] = []
    for prompt in range(4):
        own = [row for row in usable if rows[row][0] == prompt]
        count = int(config.keep) if config.by == "best" else math.ceil(round(config.keep * len(own), 9))
        chosen += best(own, count)
    return sorted(chosen)


@given(
    ROWS,
    st.sampled_from([("best", 1.0), ("best", 2.0), ("fraction", 0.3), ("fraction", 1.0), ("top", 1.0), ("top", 4.0)]),
    st.booleans(),
)
def test_what_is_chosen_is_what_a_search_by_hand_finds(rows: list, how: tuple, truncated: bool) -> None:
    config = SelectConfig(by=how[0], keep=how[1], truncated=truncated)
    assert select(pool_of(rows), config).tolist() == by_hand(rows, config)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5, width=32)), min_size=1))
def test_the_chosen_score_no_less_than_all_do_on_average(rows: list) -> None:
    pool = pool_of([(prompt, str(number), score, True) for number, (prompt, score) in enumerate(rows)])
    top = pool.score[select(pool, SelectConfig(by="top", keep=3))]
    assert top.mean() >= pool.score.mean() - 1e-5
    best = select(pool, SelectConfig())
    for row in best:
        own = pool.score[pool.prompt == pool.prompt[row]]
        assert pool.score[row] == own.max()


def test_of_equal_scores_the_first_is_chosen() -> None:
    pool = pool_of([(0, "a", 1.0, True), (0, "b", 2.0, True), (0, "c", 2.0, True), (1, "d", 2.0, True)])
    assert select(pool, SelectConfig()).tolist() == [1, 3]
    assert select(pool, SelectConfig(by="top", keep=2)).tolist() == [1, 2]


def test_an_answer_given_twice_to_a_prompt_is_chosen_once_and_to_two_prompts_twice() -> None:
    rows = [(0, "a", 3.0, True), (0, " a\n", 3.0, True), (0, "b", 1.0, True), (1, "a", 0.0, True)]
    assert drop_duplicates(pool_of(rows), np.arange(4)).tolist() == [0, 2, 3]
    assert select(pool_of(rows), SelectConfig(keep=2)).tolist() == [0, 2, 3]


def test_an_answer_without_its_end_is_not_chosen_unless_that_is_asked_for() -> None:
    pool = pool_of([(0, "a", 9.0, False), (0, "b", 1.0, True), (1, "c", 5.0, False)])
    assert select(pool, SelectConfig()).tolist() == [1]
    assert select(pool, SelectConfig(truncated=True)).tolist() == [0, 2]
    # A whole answer is not lost to a cut one of the same text before it.
    assert select(pool_of([(0, "a", 9.0, False), (0, "a", 1.0, True)]), SelectConfig()).tolist() == [1]


def test_with_all_rounds_in_the_pool_a_prompt_keeps_the_best_answer_it_ever_got() -> None:
    first = pool_of([(0, "good", 5.0, True), (1, "poor", -1.0, True)])
    second = pool_of([(0, "worse", 2.0, True), (1, "better", 0.0, True)])
    both = Pool.join([first, second])
    assert select(both, SelectConfig()).tolist() == [0, 3]
    assert len(Pool.join([first, second, first]).prompt) == 6


def test_a_share_of_the_answers_is_rounded_up_by_its_decimal_digits() -> None:
    pool = pool_of([(0, str(number), float(number), True) for number in range(100)])
    assert 0.07 * 100 > 7  # what floats make of it
    assert select(pool, SelectConfig(by="fraction", keep=0.07)).tolist() == list(range(93, 100))
    assert len(select(pool, SelectConfig(by="fraction", keep=0.001))) == 1


def test_best_of_one_and_all_of_them_are_every_different_answer() -> None:
    pool = pool_of([(prompt, str(prompt), -float(prompt), True) for prompt in range(5)])
    for config in (SelectConfig(), SelectConfig(by="fraction", keep=1.0), SelectConfig(by="top", keep=99)):
        assert select(pool, config).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_best_of_n_stays_within_its_kl_bound_by_enumerating_all_draws(samples: int, tied: bool) -> None:
    policy = np.array([0.45, 0.3, 0.2, 0.05])
    reward = [0.0, 2.0, 2.0 if tied else 1.0, 3.0]
    # Every draw of N answers is a prompt of its own, which is as likely as its answers are.
    draws = list(itertools.product(range(4), repeat=samples))
    rows = [(number, str(answer), reward[answer], True) for number, draw in enumerate(draws) for answer in draw]
    chosen = select(pool_of(rows), SelectConfig())
    best = np.zeros(4)
    for row in chosen:
        number, answer = rows[row][0], int(rows[row][1])
        best[answer] += policy[list(draws[number])].prod()
    assert best.sum() == pytest.approx(1)
    kl = float((best * np.log(best / policy)).sum())
    assert -1e-12 <= kl <= math.log(samples) - (samples - 1) / samples + 1e-12
    if samples == 1:
        assert best == pytest.approx(policy)
    if not tied:
        below = np.array([policy[[other for other in range(4) if reward[other] < reward[y]]].sum() for y in range(4)])
        assert best == pytest.approx((below + policy) ** samples - below**samples)


def test_nothing_to_choose_from_gives_nothing() -> None:
    assert select(pool_of([]), SelectConfig()).tolist() == []
    assert select(pool_of([(0, "a", 1.0, False)]), SelectConfig(by="fraction", keep=0.5)).tolist() == []


@pytest.mark.parametrize(("by", "keep"), [("best", 0), ("best", 1.5), ("top", -1), ("fraction", 0), ("fraction", 1.1)])
def test_a_number_that_makes_no_sense_is_refused(by: str, keep: float) -> None:
    with pytest.raises(InputError, match=r"--select\.keep is"):
        SelectConfig(by=by, keep=keep).check()  # type: ignore[arg-type]
