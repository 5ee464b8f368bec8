"""Open questions and dialogues: what a model answers, beside what doctors answered.

    chimed=FILE, huatuo26m=FILE, cmedqa2=FOLDER        the data sets' own files
    mc-dialogue=FILE                                   the doctor's last turn, given the dialogue before it
    qa=FILE, dialogue=FILE                             the last answer of any conversations that tools/sft.py reads

The wording of plain prompts and how answers are drawn are the two tables below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engine.chatting import SamplingConfig
from engine.data.conversations import KEYS
from evals.characters import tokenizer_of
from evals.dialogue_files import read_dialogues
from evals.generation_scores import judge_answers
from evals.paper_metrics import SIGNATURE
from evals.qa_files import read_chimed, read_cmedqa2, read_conversations, read_huatuo
from evals.questions import Question, Questions
from evals.suite import BuildContext, Builder, TaskSpec
from evals.task import Answer, Answered, Prompt, Response, Result
from evals.text_metrics import TextScorer
from model.chat import Message
from model.errors import InputError


@dataclass(frozen=True)
class Wording:
    """How turns are written down in one text, for models that do not chat. The speaker's name ends an answer, too."""

    user: str
    assistant: str


PLAIN = {"qa": Wording("问：", "答："), "dialogue": Wording("患者：", "医生：")}
"""Beside these a prompt holds the questions and answers as they stand in the files, and nothing else."""

DECODING = {
    "standard": {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 512},
    "paper": {"temperature": 1.0, "top_p": 0.85, "max_new_tokens": 512},  # generate.py of the authors
}


@dataclass(frozen=True)
class GenerationTask:
    """Questions that are answered freely.

    exemplars: earlier turns of every question, each with its first reference as the answer.
    wording: of prompts as one text; None for messages.
    counts, notes: of the reading.
    """

    name: str
    questions: tuple[Question, ...]
    exemplars: tuple[Question, ...]
    wording: Wording | None
    sampling: SamplingConfig
    seed: int
    scorer: TextScorer
    is_paper: bool
    settings: Mapping[str, str | int | float | bool]
    counts: Mapping[str, int]
    notes: tuple[str, ...]
    kind: Literal["generation"] = "generation"

    def requests(self) -> list[Answer]:
        asked_as = self._asked_as()
        questions = [one for one in self.questions if asked_as[one.id] == one.id]
        return [Answer(one.id, self.prompt(one), self.sampling, self.seed) for one in questions]

    def result(self, responses: Mapping[str, Response]) -> Result:
        answers = {}
        for id, source in self._asked_as().items():
            response = responses[source]
            assert isinstance(response, Answered)
            answers[id] = response
        result = judge_answers(self.questions, answers, self._shown, self.scorer, self.is_paper, self.seed)
        return replace(result, counts={**self.counts, **result.counts}, notes=(*result.notes, *self.notes))

    def _asked_as(self) -> dict[str, str]:
        """By the id of each question, the one whose answer is taken: where nothing is drawn, the same question has the
        same answer and is asked once, as those of ChiMed with their two references."""
        if self.sampling.temperature > 0:
            return {one.id: one.id for one in self.questions}
        first: dict[tuple[Message, ...], str] = {}
        return {one.id: first.setdefault(one.messages, one.id) for one in self.questions}

    def prompt(self, question: Question) -> Prompt:
        """Exemplars and what was said, up to the turn that is to be given."""
        turns = [message for message in question.messages if message.role != "system"]
        system = question.messages[: len(question.messages) - len(turns)]
        shots = [_whole(exemplar) for exemplar in self.exemplars]
        if self.wording is None:
            return (*system, *(message for shot in shots for message in shot), *turns)
        blocks = [message.content for message in system]
        blocks += [_lines(shot, self.wording) for shot in shots]
        return "\n\n".join((*blocks, f"{_lines(turns, self.wording)}\n{self.wording.assistant}"))

    def _shown(self, question: Question) -> str:
        prompt = self.prompt(question)
        return prompt if isinstance(prompt, str) else "\n".join(f"[{turn.role}] {turn.content}" for turn in prompt)


def _whole(exemplar: Question) -> list[Message]:
    """Its turns and their answer, without a system prompt."""
    turns = [message for message in exemplar.messages if message.role != "system"]
    return [*turns, Message("assistant", exemplar.references[0])]


def _lines(turns: Sequence[Message], wording: Wording) -> str:
    names = {"user": wording.user, "assistant": wording.assistant}
    return "\n".join(f"{names[turn.role]}{turn.content}" for turn in turns)


def _build(spec: TaskSpec, context: BuildContext) -> GenerationTask:
    mode = spec.take_choice("mode", ("standard", "paper"))
    is_paper = mode == "paper"
    path = spec.require_path(_FILES[spec.name])
    wording = PLAIN["dialogue" if "dialogue" in spec.name else "qa"] if context.prompting == "plain" else None
    default = DECODING[mode]
    sampling = SamplingConfig(
        temperature=spec.take_float("temperature", default["temperature"]),
        top_p=spec.take_float("top_p", default["top_p"], high=1.0),
        max_new_tokens=spec.take_int("max_new_tokens", int(default["max_new_tokens"]), low=1),
        stop=[f"\n{wording.user}"] if wording else [],
    )
    sampling.options(())  # see that it can be
    seed = spec.take_int("seed", context.seed)
    scorer = TextScorer(tokenizer_of(spec.take_choice("tok", ("char", "jieba"))))
    found, exemplars = _read(spec, path, is_paper), _exemplars(spec, is_paper)
    shown = {exemplar.messages for exemplar in exemplars}
    left = [question for question in found.questions if question.messages not in shown]
    if not left:
        raise InputError(f"--tasks {spec.name}: all questions of {path} are exemplars. Give another file.")
    counts = {**found.counts, "left_out_as_exemplars": len(found.questions) - len(left)}
    asked = tuple(context.draw(left))
    return GenerationTask(
        name=spec.take_str("label", spec.name),
        questions=asked,
        exemplars=exemplars,
        wording=wording,
        sampling=sampling,
        seed=seed,
        scorer=scorer,
        is_paper=is_paper,
        settings={
            "mode": mode,
            "shots": len(exemplars),
            "prompting": context.prompting,
            **{name: value for name, value in vars(sampling).items() if name in default},
            "seed": seed,
            **_options(spec),
            "questions": Questions(asked).fingerprint,
            "exemplars": Questions(exemplars).fingerprint if exemplars else "",
            "signature": scorer.signature + (f"|{SIGNATURE}" if is_paper else ""),
        },
        counts={name: number for name, number in counts.items() if number},
        notes=found.notes,
    )


def _read(spec: TaskSpec, path: Path | str, is_paper: bool) -> Questions:
    if spec.name == "chimed":
        return read_chimed(path, spec.take_choice("references", ("each", "all", "adopted")), is_cleaned=is_paper)
    if spec.name == "huatuo26m":
        return read_huatuo(path)
    if spec.name == "cmedqa2":
        return read_cmedqa2(path, spec.take_choice("references", ("all", "each"), "each" if is_paper else "all"))
    if spec.name == "mc-dialogue":
        return read_dialogues(path)
    keys = {key: names.split("+") for key in KEYS if key != "system" and (names := spec.take_str(key))}
    return read_conversations(path, keys, spec.take_str("system"))


def _options(spec: TaskSpec) -> dict[str, str]:
    """What else the reading of the files depends on."""
    return {key: spec.options[key] for key in ("references", "system", *KEYS) if key in spec.options}


def _exemplars(spec: TaskSpec, is_paper: bool) -> tuple[Question, ...]:
    """The first questions of another file of the same kind, of those that are asked twice the first."""
    shots, path = spec.take_int("shots", 0), spec.take_str("exemplars")
    if bool(shots) != (path is not None):
        raise InputError(
            f"--tasks {spec.name}: shots and exemplars come together. Write shots=5,exemplars=FILE, or neither."
        )
    if path is None:
        return ()
    if not Path(path).exists():
        raise InputError(f"--tasks {spec.name}: exemplars={path} is not there. Check the path.")
    asked: dict[tuple[Message, ...], Question] = {}
    for question in _read(spec, path, is_paper).questions:
        asked.setdefault(question.messages, question)
    found = tuple(asked.values())
    if len(found) < shots:
        raise InputError(f"--tasks {spec.name}: {path} holds {len(found)} exemplars, but shots={shots}. Lower it.")
    return found[:shots]


_FILES = {
    "chimed": "ChiMed.v1.test.json",
    "huatuo26m": "a file of questions and answers",
    "cmedqa2": "the folder of question.csv, answer.csv and test_candidates.txt",
    "mc-dialogue": "a .dialog file",
    "qa": "a file of questions and answers",
    "dialogue": "a file of conversations",
}

BUILDERS: dict[str, Builder] = dict.fromkeys(_FILES, _build)
