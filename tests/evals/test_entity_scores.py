"""Counts of right entities, against enumeration and against seqeval and nervaluate."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.entity_scores import Counts, claim, pairs, relaxed, relaxed_spans, strict
from evals.entity_text import FoldedText, fold
from tests.evals.entity_cases import corpora, overlaps_are_single

RECORDED = json.loads((Path(__file__).parent / "recorded" / "entities.json").read_text(encoding="utf-8"))
MENTIONS = st.sets(st.tuples(st.sampled_from("病药"), st.text("甲乙", min_size=1, max_size=3)), max_size=5)


def said_of(text: str, *entities: tuple[str, str]) -> set[tuple[str, int, int]]:
    return claim(pairs(entities), FoldedText(text))


def largest_pairing(left: list, right: list, fits) -> int:
    """By trying every assignment of the shorter side."""
    if len(left) > len(right):
        left, right, fits = right, left, lambda a, b, old=fits: old(b, a)
    return max(sum(map(fits, left, order)) for order in itertools.permutations(right, len(left)))


def test_exact_spans_are_counted_as_seqeval_counts_them() -> None:
    for texts, recorded in zip(corpora(len(RECORDED["exact"])), RECORDED["exact"], strict=True):
        counts = [strict(set(said), set(gold)) for gold, said in texts]
        whole = Counts(*map(sum, zip(*counts, strict=True)))
        ours = [top / bottom for top, bottom in (whole.precision, whole.recall, whole.f1)]
        assert ours == pytest.approx(recorded, abs=1e-12)


def test_overlapping_spans_are_counted_as_nervaluate_counts_them() -> None:
    seen = 0
    for texts, recorded in zip(corpora(len(RECORDED["overlapping"])), RECORDED["overlapping"], strict=True):
        single = [text for text in texts if overlaps_are_single(*text)]
        assert sum(relaxed_spans(set(said), set(gold)).right for gold, said in single) == recorded
        seen += len(single)
    assert seen > 1000  # the comparison is of something


@given(MENTIONS, MENTIONS)
def test_relaxed_mentions_are_the_largest_one_to_one_pairing(said: set, gold: set) -> None:
    def fits(a: tuple[str, str], b: tuple[str, str]) -> bool:
        return a[0] == b[0] and (a[1] in b[1] or b[1] in a[1])

    assert relaxed(said, gold) == Counts(largest_pairing(list(said), list(gold), fits), len(said), len(gold))


SPANS = st.sets(
    st.tuples(st.sampled_from("病药"), st.integers(0, 6), st.integers(1, 4)).map(lambda s: (s[0], s[1], s[1] + s[2])),
    max_size=6,
)


@given(SPANS, SPANS)
def test_relaxed_spans_are_the_largest_one_to_one_pairing(said: set, gold: set) -> None:
    def fits(a: tuple, b: tuple) -> bool:
        return a[0] == b[0] and bool(set(range(*a[1:])) & set(range(*b[1:])))

    assert relaxed_spans(said, gold) == Counts(largest_pairing(list(said), list(gold), fits), len(said), len(gold))


@given(MENTIONS, MENTIONS)
def test_relaxed_is_never_below_strict_and_never_above_either_side(said: set, gold: set) -> None:
    assert strict(said, gold).right <= relaxed(said, gold).right <= min(len(said), len(gold))
    assert relaxed(said, gold).right == relaxed(gold, said).right


def test_one_long_mention_is_right_about_one_short_one_only() -> None:
    gold = pairs([("病", "肺炎"), ("病", "心衰")])
    assert relaxed(pairs([("病", "肺炎心衰")]), gold) == Counts(1, 1, 2)


def test_a_pairing_changes_over_where_that_makes_room() -> None:
    # 甲乙 fits both; 甲 fits 甲乙 alone. Taken greedily, 甲乙-甲乙 leaves 甲 out.
    assert relaxed({("病", "甲乙"), ("病", "甲")}, {("病", "甲乙"), ("病", "乙")}).right == 2


def test_a_chain_of_a_thousand_overlaps_is_paired() -> None:
    gold = {("病", 10 * at, 10 * at + 10) for at in range(1000)}
    said = {("病", 10 * at + 5, 10 * at + 15) for at in range(1000)}
    assert relaxed_spans(said, gold).right == 1000


def test_full_width_letters_capitals_and_spaces_do_not_make_another_mention() -> None:
    assert pairs([("检查", "ＣＴ")]) == pairs([("检查", "ct")]) == pairs([("检查", "C T")])
    assert strict(pairs([("药", "维生素Ｂ１２")]), pairs([("药", "维生素b 12")])) == Counts(1, 1, 1)


def test_punctuation_of_another_width_is_the_same_but_marks_of_its_own_are_not() -> None:
    assert fold("癌（Ⅱ期），高分化") == fold("癌(II期),高分化")
    assert fold("头痛、恶心") != fold("头痛，恶心") and fold("头痛。") != fold("头痛")


def test_a_repeated_mention_means_each_of_its_places() -> None:
    text = "水痘后又见水痘"
    assert said_of(text, ("病", "水痘")) == {("病", 0, 2), ("病", 5, 7)}
    assert said_of(text, ("病", "水痘"), ("病", "水 痘")) == said_of(text, ("病", "水痘"))


def test_a_place_inside_a_longer_mention_is_not_meant_if_there_is_another() -> None:
    text = "偏头痛与头痛"
    assert said_of(text, ("病", "偏头痛"), ("症", "头痛")) == {("病", 0, 3), ("症", 4, 6)}
    assert said_of(text, ("症", "头痛")) == {("症", 1, 3), ("症", 4, 6)}


@given(MENTIONS, st.text("甲乙", max_size=12))
def test_places_are_those_that_lie_in_no_other_or_all_where_every_one_does(said: set, text: str) -> None:
    found = {mention: FoldedText(text).find(mention) for _, mention in said}
    every = [place for places in found.values() for place in places]
    expected = set()
    for kind, mention in said:
        inside = [any(a <= b[0] and b[1] <= c and (a, c) != b for a, c in every) for b in found[mention]]
        expected |= {(kind, *b) for b, is_in in zip(found[mention], inside, strict=True) if all(inside) or not is_in}
    claimed = claim(said, FoldedText(text))
    assert {span for span in claimed if span[1] >= 0} == expected
    nowhere = [span for span in claimed if span[1] < 0]
    assert len(nowhere) == sum(not found[mention] for _, mention in said)


def test_an_answer_that_repeats_a_character_is_placed_in_a_long_text() -> None:
    text, said = FoldedText("甲" * 3000), {("病", "甲" * length) for length in range(1, 60)}
    began = time.process_time()
    claimed = claim(said, text)
    assert len(claimed) == sum(3000 - length + 1 for length in range(1, 60))
    assert time.process_time() - began < 10  # every place against every other: minutes


def test_a_mention_that_stands_only_inside_another_is_nested() -> None:
    text = "呼吸肌麻痹可并发肺炎"
    said = said_of(text, ("身体", "呼吸肌"), ("症", "呼吸肌麻痹"), ("病", "肺炎"))
    assert said == {("身体", 0, 3), ("症", 0, 5), ("病", 8, 10)}
    assert strict(said, said) == Counts(3, 3, 3)


def test_the_same_mention_of_two_types_has_its_places_twice() -> None:
    assert said_of("肺炎", ("病", "肺炎"), ("症", "肺炎")) == {("病", 0, 2), ("症", 0, 2)}


def test_a_mention_that_the_text_does_not_have_is_one_wrong_span() -> None:
    said = said_of("肺炎", ("病", "肺癌"), ("病", "肺炎"), ("药", "肺癌"))
    assert len(said) == 3 and strict(said, {("病", 0, 2)}) == Counts(1, 3, 1)
    assert relaxed_spans(said, {("病", 0, 2), ("药", 0, 2)}).right == 1


def test_a_mention_hand_counted_over_two_texts() -> None:
    # Text 1: gold 发热 咳嗽 肺炎; said 发热 肺炎 高热: tp 2, fp 1, fn 1. Text 2: nothing there, one said: fp 1.
    one = strict(
        pairs([("症", "发热"), ("病", "肺炎"), ("症", "高热")]), pairs([("症", "发热"), ("症", "咳嗽"), ("病", "肺炎")])
    )
    two = strict(pairs([("症", "乏力")]), pairs([]))
    whole = Counts(*map(sum, zip(one, two, strict=True)))
    assert whole == Counts(2, 4, 3)
    assert whole.f1 == (4, 7) and whole.precision == (2, 4) and whole.recall == (2, 3)
