"""A task of multiple choice: its requests, and what the responses to them are worth.

    accuracy        of all questions alike, with Wilson's interval by the questions that differ
    subject_mean    the mean of the subjects' accuracies, as C-Eval, CMMLU and CMB report it
    acc_norm        of lm-evaluation-harness: by log-likelihood per character; of letters, which have one, the accuracy
    text_accuracy   of answers in words, by the options' texts that they mention, whatever the letter
    parse_failures  answers in words in which no letter was found; they count as wrong

A question with several right options is right if just these are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from engine.chatting import SamplingConfig
from engine.intervals import wilson_interval
from evals.choice_answers import find_letters, find_texts
from evals.choice_files import LETTERS, Question
from evals.choice_prompts import Asked, Protocol, Writer
from evals.comparison import bootstrap_interval
from evals.task import Answer, Answered, Choose, Chosen, Item, Metric, Request, Response, Result

FAILURES = "parse_failures"
PLAIN_STOP = "\n\n"
"""Ends an answer where there is no template: exemplars are set apart by it."""


@dataclass(frozen=True)
class ChoiceTask:
    """questions: that are asked. exemplars: shown with those of a subject. means_subjects: whether subjects that count
    the same are what the dataset's authors report. counts: of what was left out before anything was asked."""

    name: str
    writer: Writer
    questions: tuple[Question, ...]
    exemplars: Mapping[str, Sequence[Question]]
    max_new_tokens: int
    seed: int
    means_subjects: bool
    read: Mapping[str, str | int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kind: Literal["choice"] = "choice"

    @property
    def protocol(self) -> Protocol:
        return self.writer.protocol

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        wording = self.writer.wording
        shots = max(map(len, self.exemplars.values()), default=0)
        signature = f"{self.protocol.name}|shots:{shots}|n:{len(self.questions)}|version:1"
        return {
            **self.read,
            "protocol": self.protocol.name,
            "shots": shots,
            "prompting": "chat" if self.writer.is_chat else "plain",
            "header": wording.header,
            "question": wording.question + wording.option + wording.ask,
            "questions": len(self.questions),
            "signature": signature,
            **({} if self.protocol.is_likelihood else {"max_new_tokens": self.max_new_tokens}),
        }

    def requests(self) -> Sequence[Request]:
        pairs = list(zip(self.questions, self._asked, strict=True))
        if self.protocol.is_likelihood:
            return [Choose(one.id, asked.prompt, self.writer.options(one)) for one, asked in pairs]
        stop = [] if self.writer.is_chat else [PLAIN_STOP]
        sampling = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=self.max_new_tokens, stop=stop)
        return [Answer(one.id, asked.prompt, sampling) for one, asked in pairs]

    def result(self, responses: Mapping[str, Response]) -> Result:
        taken = [self._take(question, responses[question.id]) for question in self.questions]
        items = tuple(map(self._item, self.questions, self._asked, taken))
        counts = Counter(self.counts)
        counts["exemplars_dropped"] = sum(asked.dropped for asked in self._asked)
        counts["headers_dropped"] = sum(asked.is_headless for asked in self._asked)
        counts["ties"] = sum(one.is_tie for one in taken)
        if not self.protocol.is_likelihood:
            counts["unparsed"] = sum(not one.letters for one in taken)
            counts["letter_is_not_of_the_text"] = sum(one.is_at_odds for one in taken)
        chosen = Counter(one.letters or "none" for one in taken)
        spread = ", ".join(f"{letters} {count}" for letters, count in sorted(chosen.items()))
        return Result(
            self._measure(items),
            items,
            self._groups(items),
            self._baselines(),
            {name: count for name, count in counts.items() if count},
            (self.protocol.note, *self.notes, f"Chosen: {spread}."),
        )

    @cached_property
    def _asked(self) -> list[Asked]:
        return [self.writer.ask(question, self.exemplars.get(question.subject, ())) for question in self.questions]

    def _take(self, question: Question, response: Response) -> _Taken:
        if isinstance(response, Answered):
            letters = find_letters(response.text, question.options, question.text)
            said = response.text if response.text.strip() == letters else f"{response.text}\n→ {letters or 'none'}"
            return _Taken(letters, said, find_texts(response.text, question.options))
        assert isinstance(response, Chosen)
        # The first of the likeliest, as numpy's argmax in lm-evaluation-harness and in the official scripts.
        best = max(response.logprobs)
        letter = LETTERS[response.logprobs.index(best)]
        lengths = map(len, self.writer.choices(question))
        normed = [logprob / length for logprob, length in zip(response.logprobs, lengths, strict=True)]
        return _Taken(letter, letter, LETTERS[normed.index(max(normed))], response.logprobs.count(best) > 1)

    def _item(self, question: Question, asked: Asked, taken: _Taken) -> Item:
        right = float(taken.letters == question.answer), 1.0
        parts = {"accuracy": right}
        if self.means_subjects:
            parts["subject_mean"] = right
        for name in self._others:
            parts[name] = float(taken.others == question.answer), 1.0
        if not self.protocol.is_likelihood:
            parts[FAILURES] = float(not taken.letters), 1.0
        prompt = asked.prompt
        shown = prompt if isinstance(prompt, str) else "\n\n".join(message.content for message in prompt)
        if not self.writer.wording.option:  # none is listed in it: then those whose likelihoods are compared
            listed = zip(question.letters, question.options, strict=True)
            shown += "\n" + "".join(f"\n{letter} {option}" for letter, option in listed)
        texts = question.text, *question.options
        return Item(question.id, parts, shown, taken.said, question.answer, question.subject, texts)

    @property
    def _others(self) -> tuple[str, ...]:
        """By what else than `accuracy` an answer is right."""
        if not self.protocol.is_likelihood:
            return ("text_accuracy",)
        return ("acc_norm",) if self.protocol.has_norm else ()

    def _measure(self, items: Sequence[Item]) -> tuple[Metric, ...]:
        metrics = [_share("accuracy", items)]
        subjects = _by_subject(items)
        if self.means_subjects and len(subjects) > 1:
            value = sum(_share("accuracy", own).value for own in subjects.values()) / len(subjects)
            low, high = bootstrap_interval(items, "subject_mean", self.seed, by_group=True)
            metrics.append(Metric("subject_mean", value, low, high, len(items)))
        metrics += [_share(name, items) for name in self._others]
        if not self.protocol.is_likelihood:
            metrics.append(_share(FAILURES, items, better="lower"))
        return tuple(metrics)

    def _groups(self, items: Sequence[Item]) -> dict[str, tuple[Metric, ...]]:
        """By subject; and where questions differ in how many options are right, by that."""
        groups = _by_subject(items) if len(_by_subject(items)) > 1 else {}
        several = {question.id for question in self.questions if len(question.answer) > 1}
        if several:
            groups["one right option"] = [item for item in items if item.id not in several]
            groups["several right options"] = [item for item in items if item.id in several]
        return {name: (_share("accuracy", own),) for name, own in groups.items() if own}

    def _baselines(self) -> tuple[tuple[str, str, float], ...]:
        """The same letter for every question, and a letter drawn for each."""
        n, answers = len(self.questions), Counter(question.answer for question in self.questions)
        letters = LETTERS[: max(len(question.options) for question in self.questions)]
        drawn = sum(1 / len(question.options) for question in self.questions if len(question.answer) == 1)
        always = ((f"always {letter}", "accuracy", answers[letter] / n) for letter in letters)
        return (*always, ("a letter drawn at random", "accuracy", drawn / n))


class _Taken(NamedTuple):
    """letters: of the answer; "" for none. said: in the words of the report. others: the letters by the metric beside
    accuracy."""

    letters: str
    said: str
    others: str
    is_tie: bool = False

    @property
    def is_at_odds(self) -> bool:
        """Whether an answer in words names a letter, and the text of one other option."""
        return len(self.letters) == len(self.others) == 1 and self.letters != self.others


def _share(name: str, items: Sequence[Item], better: Literal["higher", "lower"] = "higher") -> Metric:
    value = sum(item.parts[name][0] for item in items) / len(items)
    return Metric(name, value, *wilson_interval(value, len({item.shown for item in items})), len(items), better=better)


def _by_subject(items: Sequence[Item]) -> dict[str, list[Item]]:
    subjects: dict[str, list[Item]] = {}
    for item in items:
        subjects.setdefault(item.group, []).append(item)
    return subjects
