"""Entities as ChiMed-GPT's evaluation compares them: its first items, its sampling, its sets of words.

Gold and answer are cut at newlines; of each line the first two words, as spaces part them, are one element of a set.
Read off the authors' script (IDEA-CCNL/Fengshenbang-LM at be59e1e, generate.py), with what follows from it: nothing is
folded, a line of one word is an element of one word, an empty line is an element of none, so that an empty answer is
right about an empty line, and an answer that ends in a newline has one element more than it shows.

Their prompts are not public. A file of records {"prompt": [...], "output": [...]}, as theirs are, is asked as it is;
from any other file prompts and gold are written in the wording "words" of `entity_prompts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from engine.chatting import SamplingConfig
from engine.files import digest_files
from evals.comparison import bootstrap_interval
from evals.entity_files import LAYOUTS, read_annotated
from evals.entity_prompts import WORDINGS, ask, shown, write
from evals.entity_records import Written, holds_written, read_written
from evals.entity_scores import strict
from evals.suite import BuildContext, TaskSpec
from evals.task import Answer, Answered, Item, Metric, Prompt, Request, Response, Result
from model.chat import Message
from model.errors import InputError
from model.sampling import row_seed

FIRST = {"ccks2019": 200, "chimst": 100}
"""How many items of the test file count."""
NOTES = (
    "Paper mode: elements are the first two words of each line, an empty line is one too, nothing is folded. Never "
    "to be compared with micro_f1.",
    "The published figures come from models that had CCKS 2019's and ChiMST's training sets among their data.",
)


@dataclass(frozen=True)
class PaperTask:
    """records: prompts with their answers; exemplars: the same, before each."""

    name: str
    records: tuple[Written, ...]
    exemplars: tuple[Written, ...]
    prompting: Literal["chat", "plain"]
    seed: int
    read: Mapping[str, str | int] = field(default_factory=dict)
    kind: Literal["entities"] = "entities"

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {
            **self.read,
            "shots": len(self.exemplars),
            "prompting": self.prompting,
            "sampling": "temperature 1, top_p 0.85, at most 512 tokens",
            "signature": "paper|first two words of a line|empty lines count|version:1",
            "seed": self.seed,
        }

    def requests(self) -> Sequence[Request]:
        sampling = SamplingConfig(temperature=1.0, top_p=0.85, max_new_tokens=512)
        return [
            Answer(str(record.number), self._prompt(record), sampling, row_seed(self.seed, record.number))
            for record in self.records
        ]

    def result(self, responses: Mapping[str, Response]) -> Result:
        items = []
        for record in self.records:
            response = responses[str(record.number)]
            assert isinstance(response, Answered)
            found = strict(elements(response.text), elements(record.output))
            parts = {"paper_f1": found.f1, "paper_precision": found.precision, "paper_recall": found.recall}
            prompt = shown(self._prompt(record))
            items.append(Item(str(record.number), parts, prompt, response.text, record.output, texts=(record.prompt,)))
        metrics = tuple(self._metric(items, name) for name in ("paper_f1", "paper_precision", "paper_recall"))
        return Result(metrics, tuple(items), notes=NOTES)

    def _prompt(self, record: Written) -> Prompt:
        if self.prompting == "plain":
            before = (f"{one.prompt}\n{one.output}\n\n" for one in self.exemplars)
            return f"{''.join(before)}{record.prompt}\n"
        turns = [(Message("user", one.prompt), Message("assistant", one.output)) for one in self.exemplars]
        return (*(message for turn in turns for message in turn), Message("user", record.prompt))

    def _metric(self, items: Sequence[Item], name: str) -> Metric:
        top, bottom = np.sum([item.parts[name] for item in items], axis=0)
        return Metric(name, float(top / bottom), *bootstrap_interval(items, name, self.seed), n=len(items))


def build_paper(
    spec: TaskSpec,
    context: BuildContext,
    name: str,
    path: Path,
    exemplars_path: Path | None,
    shots: int,
    leave_out_misplaced: bool,
) -> PaperTask:
    """The task on the first items of a file. Raises InputError: it cannot be used."""
    if spec.name not in FIRST:
        spec.refuse("protocol", f"for {spec.name}; it is for {' and '.join(FIRST)}")
    records = _records(path, spec.name, leave_out_misplaced)[: FIRST[spec.name]]
    before = _records(exemplars_path, spec.name, leave_out_misplaced)[:shots] if exemplars_path else ()
    if len(before) < shots:
        raise InputError(f"{exemplars_path}: it holds {len(before)} examples, fewer than shots={shots}. Ask for fewer.")
    read: dict[str, str | int] = {"dataset": spec.name, "protocol": "paper", "file": digest_files(path)}
    if exemplars_path:
        read["exemplars"] = digest_files(exemplars_path)
    return PaperTask(name, tuple(context.draw(records)), before, context.prompting, context.seed, read)


def _records(path: Path, dataset: str, leave_out_misplaced: bool) -> tuple[Written, ...]:
    """A file's prompts with their answers, or its texts written so."""
    if holds_written(path):
        return read_written(path)
    reading, wording = read_annotated(path, LAYOUTS[dataset], leave_out_misplaced), WORDINGS["words"]
    return tuple(
        Written(text.number, shown(ask(text, (), reading.types, wording, "chat")), write(text, reading.types, wording))
        for text in reading.texts
    )


def elements(text: str) -> set[tuple[str, ...]]:
    """What of an answer, or of the right one, is compared; never empty."""
    return {tuple(line.split()[:2]) for line in text.split("\n")}
