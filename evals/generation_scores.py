"""What the answers to open questions are worth: BLEU, ROUGE, and what these do not see."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from engine.intervals import wilson_interval
from evals import paper_metrics
from evals.bootstrap import Resampled
from evals.comparison import bootstrap_interval, by_prompt
from evals.questions import Question
from evals.task import Answered, Item, Metric, Result
from evals.text_metrics import COLUMNS, ROUGE, TextScorer, bleu, distinct

ORDERS = (1, 2, 4)
PAPER_ROUGE = ("paper_rouge_1", "paper_rouge_2", "paper_rouge_l")
PAPER_BLEU = dict(zip(("paper_bleu_1", "paper_bleu_2"), paper_metrics.ORDERS, strict=True))
BASELINE = "answers to other questions"

_BASELINE_ITEMS = 1000
_DISTINCT = "distinct_n falls as a corpus grows: compare it on the same questions only. It has no interval."
_PAPER = (
    "paper_bleu_* and paper_rouge_* are computed as the published ChiMed-GPT table was. They are INFLATED and compare "
    "with that table alone: paper_bleu_1 and _2 are scores of 1- to 2- and of 1- to 3-grams of characters, among which "
    "the spaces put between them count, and paper_rouge_* count a character once a text. See what answers to other "
    "questions score, and use bleu_* and rouge_* for everything else."
)

_MEANS = (*ROUGE, *(f"sentence_bleu_{n}" for n in ORDERS))


class _Scores(NamedTuple):
    """Of one answer. means: by the names of scores that are averaged; statistics, paper: BLEU's sufficient ones, of
    `evals.text_metrics` and, empty where it is not asked for, `evals.paper_metrics`."""

    tokens: list[str]
    means: dict[str, float]
    statistics: np.ndarray
    paper: np.ndarray


Score = Callable[[Question, str], _Scores]


def judge_answers(
    questions: Sequence[Question],
    answers: Mapping[str, Answered],
    shown: Callable[[Question], str],
    scorer: TextScorer,
    is_paper: bool,
    seed: int,
) -> Result:
    """The result of a task.

    Args:
        answers: by the ids of the questions.
        shown: the prompt, for the report.
        is_paper: whether the published table's metrics are computed, too.
        seed: of intervals and baselines.
    """

    def score(question: Question, answer: str) -> _Scores:
        return _score(question, answer, scorer, is_paper)

    said = [answers[question.id] for question in questions]
    scores = [score(question, answer.text) for question, answer in zip(questions, said, strict=True)]
    items = tuple(_item(*of_one, shown) for of_one in zip(questions, said, scores, strict=True))
    groups = sorted({item.group for item in items if item.group})
    return Result(
        metrics=(*_resampled(scores, items, seed), *_plain(scores, items, seed)),
        items=items,
        groups={group: (_of_group([item for item in items if item.group == group], seed),) for group in groups},
        baselines=tuple(_baselines(questions, score, seed)),
        counts=_counts(said, scores),
        notes=(_PAPER, _DISTINCT) if is_paper else (_DISTINCT,),
    )


def _score(question: Question, answer: str, scorer: TextScorer, is_paper: bool) -> _Scores:
    tokens, statistics, rouge = scorer.score(answer, question.references)
    means = dict(zip(_MEANS, (*rouge, *(float(bleu(statistics, n, effective=True)) for n in ORDERS)), strict=True))
    paper = np.empty(0)
    if is_paper:
        spaced, *references = map(paper_metrics.space_out, (answer, *question.references))
        paper = paper_metrics.bleu_statistics(spaced, references)
        of_each = [paper_metrics.rouge(spaced, reference) for reference in references]
        means |= dict(zip(PAPER_ROUGE, map(max, zip(*of_each, strict=True)), strict=True))
    return _Scores(tokens, means, statistics, paper)


def _item(question: Question, answered: Answered, scores: _Scores, shown: Callable[[Question], str]) -> Item:
    gold = question.references
    return Item(
        id=question.id,
        parts={
            **{name: (value, 1.0) for name, value in scores.means.items()},
            "length_ratio": (float(scores.statistics[0]), float(scores.statistics[1])),
            "end_rate": (float(answered.end_reason == "stop"), 1.0),
        },
        shown=shown(question),
        answer=answered.text,
        gold=gold[0] if len(gold) == 1 else "\n\n".join(f"({n}) {text}" for n, text in enumerate(gold, 1)),
        group=question.group,
        texts=(*(message.content for message in question.messages if message.role == "user"), *gold),
    )


def _resampled(scores: Sequence[_Scores], items: Sequence[Item], seed: int) -> Iterator[Metric]:
    """What is computed from sums over answers, with intervals from one resampling of the prompts."""
    resampled = Resampled(*by_prompt(items, _rows(scores)), seed)
    for name, statistic in _statistics(scores[0]).items():
        found = resampled.interval(statistic)
        yield Metric(name, found.value, found.low, found.high, n=len(scores))


def _rows(scores: Sequence[_Scores]) -> np.ndarray:
    """What each answer adds to the sums: BLEU's statistics, those of the paper, what is averaged, and 1: [N, C]."""
    return np.array([[*one.statistics, *one.paper, *one.means.values(), 1.0] for one in scores])


def _statistics(first: _Scores) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Functions of the sums of `_rows`, [..., 1, C] -> [...], by the names of metrics, in the order of the report."""
    places = {name: COLUMNS + len(first.paper) + place for place, name in enumerate(first.means)}
    means = {name: lambda sums, place=place: sums[..., 0, place] / sums[..., 0, -1] for name, place in places.items()}
    corpus = {f"bleu_{n}": lambda sums, n=n: bleu(sums[..., 0, :COLUMNS], n, effective=False) for n in ORDERS}
    if len(first.paper):
        corpus |= {
            name: lambda sums, n=n: paper_metrics.bleu(sums[..., 0, COLUMNS : COLUMNS + len(first.paper)], n)
            for name, n in PAPER_BLEU.items()
        }
    order = ("rouge_l", "rouge_1", "rouge_2", *(f"bleu_{n}" for n in ORDERS), *_MEANS, *PAPER_BLEU, *PAPER_ROUGE)
    return {name: {**means, **corpus}[name] for name in dict.fromkeys(order) if name in means or name in corpus}


def _plain(scores: Sequence[_Scores], items: Sequence[Item], seed: int) -> Iterator[Metric]:
    """What is no mean of scores. An answer that is scored by two references was given once."""
    given = {(item.shown, item.answer): one.tokens for item, one in zip(items, scores, strict=True)}
    for n in (1, 2):
        different, in_all = distinct(given.values(), n)
        yield Metric(f"distinct_{n}", different / in_all if in_all else float("nan"), n=len(items), better=None)
    yield Metric("length_ratio", *_ratio(items, "length_ratio", seed), n=len(items), unit="", better=None)
    ended = sum(item.parts["end_rate"][0] for item in items) / len(items)
    yield Metric("end_rate", ended, *wilson_interval(ended, len({item.shown for item in items})), n=len(items))


def _of_group(items: Sequence[Item], seed: int) -> Metric:
    return Metric("rouge_l", *_ratio(items, "rouge_l", seed), n=len(items))


def _ratio(items: Sequence[Item], name: str, seed: int) -> tuple[float, float, float]:
    """The ratio of sums of parts, and its interval."""
    numerator, denominator = (sum(item.parts[name][side] for item in items) for side in (0, 1))
    return numerator / denominator if denominator else float("nan"), *bootstrap_interval(items, name, seed)


def _counts(answers: Sequence[Answered], scores: Sequence[_Scores]) -> dict[str, int]:
    """What `evals.evaluation.conclude` does not count for every task."""
    counts = {
        "empty_answers": sum(not answer.text.strip() for answer in answers),
        "references_of_one_token": sum(int(one.statistics[1]) == 1 for one in scores),  # without a pair: rouge_2 is 0
    }
    return {name: number for name, number in counts.items() if number}


def _baselines(questions: Sequence[Question], score: Score, seed: int) -> Iterator[tuple[str, str, float]]:
    """What a reference of another question scores: fluent, of the right kind and length, and no answer."""
    drawn = list(questions)
    random.Random(seed).shuffle(drawn)
    drawn = drawn[:_BASELINE_ITEMS]
    scores = []
    for place, question in enumerate(drawn):
        others = (one for one in (*drawn[place + 1 :], *drawn[:place]) if one.messages != question.messages)
        if (other := next(others, None)) is not None:
            scores.append(score(question, other.references[0]))
    if scores:
        sums = _rows(scores).sum(0, keepdims=True)
        for name, statistic in _statistics(scores[0]).items():
            yield BASELINE, name, float(statistic(sums))
