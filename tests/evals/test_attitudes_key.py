"""The keys against the subscales as the authors list them, and what their balance implies."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.attitude_items import ScaleItem
from evals.attitude_key import CAMI, MICA4, Key

# Taylor & Dear 1981, table of items: five for and five against what each subscale is named after.
CAMI_TABLE = {
    "authoritarianism": ({1, 9, 17, 25, 33}, {5, 13, 21, 29, 37}),
    "benevolence": ({2, 10, 18, 26, 34}, {6, 14, 22, 30, 38}),
    "social_restrictiveness": ({3, 11, 19, 27, 35}, {7, 15, 23, 31, 39}),
    "community_mental_health_ideology": ({4, 12, 20, 28, 36}, {8, 16, 24, 32, 40}),
}
STIGMA_BY_NAME = {"authoritarianism", "social_restrictiveness"}


def test_cami_has_the_subscales_and_polarities_of_its_authors() -> None:
    for subscale, (in_favour, against) in CAMI_TABLE.items():
        own = {number for number, name in enumerate(CAMI.subscales, 1) if name == subscale}
        assert own == in_favour | against
        stigma = {number for number in own if CAMI.agreeing_is_stigma[number - 1]}
        assert stigma == (in_favour if subscale in STIGMA_BY_NAME else against)


def test_mica_4_counts_agreement_with_ten_items_and_disagreement_with_six() -> None:
    direct = {number for number, is_stigma in enumerate(MICA4.agreeing_is_stigma, 1) if is_stigma}
    assert direct == set(range(1, 17)) - {3, 9, 10, 11, 12, 16}


def test_the_paper_reverses_the_items_for_on_all_four_subscales_of_cami() -> None:
    assert CAMI.paper.reversed_items == set().union(*(in_favour for in_favour, _ in CAMI_TABLE.values()))


def test_on_two_subscales_of_cami_the_paper_counts_against_us_and_on_two_with_us() -> None:
    for subscale in CAMI_TABLE:
        numbers = [number for number, name in enumerate(CAMI.subscales, 1) if name == subscale]
        # A counts K on a reversed item, and there stands for the least agreement; ours counts 1 for it on an item
        # whose approval is stigma.
        is_opposite = [(n in CAMI.paper.reversed_items) == CAMI.agreeing_is_stigma[n - 1] for n in numbers]
        assert set(is_opposite) == {subscale in STIGMA_BY_NAME}


def test_each_list_of_options_is_distinct_and_as_long_as_the_scale_has_points() -> None:
    assert (len(set(CAMI.options)), len(set(MICA4.options))) == (5, 6)
    assert (len(CAMI.subscales), len(CAMI.agreeing_is_stigma)) == (40, 40)
    assert (len(MICA4.subscales), len(MICA4.agreeing_is_stigma)) == (16, 16)


def test_each_subscale_of_cami_is_balanced() -> None:
    balance = Counter(zip(CAMI.subscales, CAMI.agreeing_is_stigma, strict=True))
    assert len(balance) == 8 and set(balance.values()) == {5}


@given(st.lists(st.integers(0, 4), min_size=40, max_size=40))
def test_agreeing_where_one_disagreed_mirrors_every_score_of_cami(levels: list[int]) -> None:
    for subscale in CAMI_TABLE:
        assert points(CAMI, levels, subscale) + points(CAMI, [4 - level for level in levels], subscale) == 60


@given(st.lists(st.integers(0, 5), min_size=16, max_size=16))
def test_agreeing_where_one_disagreed_mirrors_the_score_of_mica_4(levels: list[int]) -> None:
    assert points(MICA4, levels) + points(MICA4, [5 - level for level in levels]) == 16 * 7


@given(st.lists(st.integers(0, 4), min_size=40, max_size=40), st.integers(0, 39))
def test_one_degree_more_agreement_moves_a_score_by_one_in_the_direction_of_the_key(
    levels: list[int], place: int
) -> None:
    levels[place] = min(levels[place], 3)
    more = [level + (at == place) for at, level in enumerate(levels)]
    assert points(CAMI, more) - points(CAMI, levels) == (1 if CAMI.agreeing_is_stigma[place] else -1)


@pytest.mark.parametrize(("key", "low", "high"), [(CAMI, 40, 200), (MICA4, 16, 96)])
def test_extremes_of_a_scale(key: Key, low: int, high: int) -> None:
    most = len(key.options) - 1
    worst = [most if is_stigma else 0 for is_stigma in key.agreeing_is_stigma]
    assert points(key, worst) == high
    assert points(key, [most - level for level in worst]) == low


def points(key: Key, levels: list[int], subscale: str | None = None) -> int:
    """The sum over the items of a subscale, or over all."""
    rows = zip(levels, key.subscales, key.agreeing_is_stigma, strict=True)
    return sum(
        ScaleItem("", "", name, is_stigma).points(len(key.options))[level]
        for level, name, is_stigma in rows
        if subscale in (None, name)
    )
