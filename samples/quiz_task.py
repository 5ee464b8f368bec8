"""The keyed questions as a task of an evaluation: what a model's answers are worth by the true reward.

    questions                   248 held-out questions about a department or a drug, four sampled answers each

Beside the tasks of `evals` this one needs no reference and no reward model: the facts know (`samples.true_reward`). A
model without a template is shown the question as bundled documents write one, 「问：…」 and 「答：」 in the next line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from engine.chatting import SamplingConfig
from evals.comparison import bootstrap_interval
from evals.suite import BuildContext, Builder, TaskSpec
from evals.task import Answer, Answered, Item, Metric, Prompt, Response, Result, Task
from model.errors import InputError
from samples.dialogues import render_dialogues
from samples.knowledge import load_knowledge
from samples.questions import KINDS, Question, names_of, questions_of
from samples.true_reward import Judge, TrueReward

ANSWERS = 4  # to a question
LONGEST = 64  # tokens of an answer
PLAIN, PLAIN_STOP = "{system}问：{question}\n答：", "\n"
REWARD = "true_reward"


@dataclass(frozen=True)
class QuizTask:
    """Questions, and the rule that judges answers to them."""

    name: str
    questions: tuple[Question, ...]
    judge: Judge
    names: Mapping[str, Sequence[str]]  # all that an answer may name, by kind of question
    sampling: SamplingConfig
    answers: int
    prompting: Literal["chat", "plain"]
    seed: int
    kind: Literal["reward"] = "reward"

    @cached_property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {
            "questions": len(self.questions),
            "answers": self.answers,
            "temperature": self.sampling.temperature,
            "max_new_tokens": self.sampling.max_new_tokens,
            "prompting": self.prompting,
            "template": PLAIN if self.prompting == "plain" else "",
            "seed": self.seed,
            "signature": "safe*(correct/2+complete/4+cautious/4)|samples.true_reward|version:1",
        }

    def requests(self) -> list[Answer]:
        return [
            Answer(_id(question, number), self._prompt(question), self.sampling, self.seed)
            for question in self.questions
            for number in range(self.answers)
        ]

    def result(self, responses: Mapping[str, Response]) -> Result:
        items = []
        for question in self.questions:
            own = [responses[_id(question, number)] for number in range(self.answers)]
            items.append(self._item(question, [response for response in own if isinstance(response, Answered)]))
        groups = {kind: [item for item in items if item.group == kind] for kind in KINDS}
        return Result(
            self._metrics(items),
            tuple(items),
            {kind: self._metrics(own) for kind, own in groups.items() if own},
            (("a department or drug named at random", "correct", self._chance()),),
            notes=(
                "The true reward is a rule over the bundled facts, for texts made of the bundled phrases; it is no "
                "judge of medical advice. Reward models of the bundled comparisons have learnt from it.",
            ),
        )

    def _prompt(self, question: Question) -> Prompt:
        if self.prompting == "chat":
            return question.messages
        systems = [message.content + "\n" for message in question.messages if message.role == "system"]
        return PLAIN.format(system="".join(systems), question=question.messages[-1].content)

    def _item(self, question: Question, answers: Sequence[Answered]) -> Item:
        verdicts = [self.judge(question, answer.text) for answer in answers]
        rows = [(verdict.total, *verdict) for verdict in verdicts]
        parts = {
            name: (float(sum(row[place] for row in rows)), float(len(rows)))
            for place, name in enumerate((REWARD, *TrueReward._fields))
        }
        parts["tokens"] = (float(sum(answer.tokens for answer in answers)), float(len(answers)))
        prompt = self._prompt(question)
        shown = prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)
        said = "\n".join(f"{row[0]:.2f}  {answer.text}" for row, answer in zip(rows, answers, strict=True))
        gold = "、".join(question.accepted)
        return Item(question.id, parts, shown, said, gold, question.kind, (question.messages[-1].content,))

    def _metrics(self, items: Sequence[Item]) -> tuple[Metric, ...]:
        metrics = []
        for name in (REWARD, *TrueReward._fields, "tokens"):
            tops, bottoms = zip(*(item.parts[name] for item in items), strict=True)
            value, span = sum(tops) / sum(bottoms), bootstrap_interval(items, name, self.seed)
            if name == "tokens":
                metrics.append(Metric(name, value, *span, len(items), "tokens", None))
            else:
                metrics.append(Metric(name, value, *span, len(items), "score" if name == REWARD else "%"))
        return tuple(metrics)

    def _chance(self) -> float:
        """The expected share of right answers of somebody who names one of the kind at random, all equally likely."""
        shares = [len(question.accepted) / len(self.names[question.kind]) for question in self.questions]
        return sum(shares) / len(shares)


def build(spec: TaskSpec, context: BuildContext) -> Task:
    """The task that a word of --tasks asks for. Raises InputError: it names a file."""
    if spec.path is not None:
        raise InputError(f"--tasks {spec.name}={spec.path}: its questions are the bundled ones. Leave the path out.")
    knowledge = load_knowledge()
    questions = questions_of(render_dialogues(knowledge)[1])
    sampling = SamplingConfig(
        temperature=spec.take_float("temperature", 1.0),
        top_p=1.0,
        max_new_tokens=spec.take_int("max_new_tokens", LONGEST, low=1),
        stop=[PLAIN_STOP] if context.prompting == "plain" else [],
    )
    return QuizTask(
        spec.name,
        tuple(context.draw(questions)),
        Judge(knowledge),
        names_of(knowledge),
        sampling,
        spec.take_int("answers", ANSWERS, low=1),
        context.prompting,
        context.seed,
    )


BUILDERS: dict[str, Builder] = {"questions": build}


def _id(question: Question, number: int) -> str:
    return f"{question.id}#{number}"
