"""The comparisons: enough, graded by the rule, every defect among them, and longer is not better."""

import itertools
import json
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from samples.bundle import bundled_preferences, bundled_prompts
from samples.dialogues import Dialogue
from samples.knowledge import Knowledge
from samples.preferences import RESPONSES, Comparison, render_preferences
from samples.questions import KINDS, questions_of
from samples.replies import has_full_answer
from samples.true_reward import Judge, TrueReward, question_of
from tests.samples.conftest import Splits


@pytest.fixture(scope="module")
def preferences(knowledge: Knowledge) -> Splits[Comparison]:
    return Splits(*render_preferences(knowledge))


@pytest.fixture(scope="module")
def keyed(preferences: Splits[Comparison]) -> Splits[Comparison]:
    """Those of questions with keys; the rest compares with a full answer."""
    sides = (preferences.train, preferences.held_out)
    return Splits(*([one for one in side if one.id.split("/")[0] in KINDS] for side in sides))


@pytest.fixture(scope="module")
def verdicts(knowledge: Knowledge, dialogues: Splits[Dialogue], keyed: Splits[Comparison]) -> list[TrueReward]:
    judge = Judge(knowledge)
    questions = {question.id: question for question in questions_of(dialogues.all)}
    return [judge(questions[one.id], response.text) for one in keyed.all for response in one.responses]


def test_there_are_two_thousand_to_train_on_each_with_four_answers_of_different_worth(
    keyed: Splits[Comparison],
) -> None:
    assert len(keyed.train) >= 2000 and len(keyed.held_out) >= 200
    for comparison in keyed.all:
        assert len({response.text for response in comparison.responses}) == RESPONSES == 4
        assert len({response.score for response in comparison.responses}) > 1
        assert comparison.prompt[-1].role == "user"


def test_no_question_of_training_is_held_out_and_the_split_is_that_of_the_conversations(
    dialogues: Splits[Dialogue], preferences: Splits[Comparison]
) -> None:
    for side, comparisons in ((dialogues.train, preferences.train), (dialogues.held_out, preferences.held_out)):
        assert {comparison.id for comparison in comparisons} <= {dialogue.id for dialogue in side}


def test_grades_are_those_of_the_rule(keyed: Splits[Comparison], verdicts: list[TrueReward]) -> None:
    scores = [response.score for comparison in keyed.all for response in comparison.responses]
    assert scores == [verdict.total for verdict in verdicts]


def test_every_virtue_is_often_there_and_often_missing_whatever_the_others_are(verdicts: list[TrueReward]) -> None:
    counts = Counter(verdicts)
    assert len(counts) >= 12
    for index, name in enumerate(TrueReward._fields):
        share = mean(verdict[index] for verdict in verdicts)
        assert 0.2 < share < 0.9, name


def test_longer_answers_win_no_more_often_than_shorter_ones(keyed: Splits[Comparison]) -> None:
    longer, shorter = 0, 0
    for comparison in keyed.all:
        for one, other in itertools.combinations(comparison.responses, 2):
            product = (one.score - other.score) * (len(one.text) - len(other.text))
            longer, shorter = longer + (product > 0), shorter + (product < 0)
    assert longer + shorter > 8000
    assert longer / (longer + shorter) == pytest.approx(0.5, abs=0.03)


def test_files_hold_what_is_rendered_and_prompts_their_keys(
    preferences: Splits[Comparison], dialogues: Splits[Dialogue], tmp_path: Path
) -> None:
    for file, written in zip(
        bundled_preferences(tmp_path / "a"), (preferences.train, preferences.held_out), strict=True
    ):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [record["id"] for record in records] == [comparison.id for comparison in written]
        assert records[0]["prompt"][-1]["content"] == written[0].prompt[-1].content
        assert records[0]["responses"][0].keys() == {"text", "score"}
    for file, side in zip(bundled_prompts(tmp_path / "b"), (dialogues.train, dialogues.held_out), strict=True):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        by_key = [record for record in records if record["kind"] in KINDS]
        assert [question_of(record) for record in by_key] == questions_of(side)
        by_answer = [record["id"] for record in records if record["kind"] not in KINDS]
        assert by_answer == [one.id for one in side if has_full_answer(one)] and len(by_answer) > 150
        assert {record["messages"][-1]["role"] for record in records} == {"assistant"}
