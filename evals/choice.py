"""Multiple choice: C-Eval, CMMLU, MedQA, CMExam, CMB-Exam, under one of several protocols.

    ceval=DIR  ceval-paper=DIR  cmmlu=DIR  cmmlu-paper=DIR  medqa=FILE  cmexam=FILE  cmb=FILE

with ,protocol=lm-eval,shots=5,subjects=anatomy+virology ... : docs/evaluation-choice.md.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from engine.files import digest_files
from evals.choice_files import Bank, Question, read_ceval, read_cmb, read_cmexam, read_cmmlu, read_medqa
from evals.choice_prompts import PROTOCOLS, Protocol, Writer
from evals.choice_subjects import CEVAL_PAPER, CMMLU_PAPER
from evals.choice_task import ChoiceTask
from evals.suite import BuildContext, Builder, TaskSpec
from evals.task import Task
from model.errors import InputError

SUITES = {"ceval-paper": ("ceval", CEVAL_PAPER), "cmmlu-paper": ("cmmlu", CMMLU_PAPER)}
FOLDERS = {"ceval": (read_ceval, ("val", "test")), "cmmlu": (read_cmmlu, ("test",))}
"""Datasets of a file a subject: how they are read, and their splits, the usual one first."""
FILES = {"medqa": read_medqa, "cmexam": read_cmexam, "cmb": read_cmb}
MAX_NEW_TOKENS = 256
"""Enough for an answer with its reasons."""


def build(spec: TaskSpec, context: BuildContext) -> Task:
    """The task that a word of --tasks asks for. Raises InputError."""
    dataset, subjects = SUITES.get(spec.name, (spec.name, ()))
    protocol, shots = _protocol(spec, dataset), spec.take_int("shots", 0)
    if shots and not protocol.has_shots:
        raise InputError(f"--tasks {spec.name}: protocol={protocol.name} shows no exemplars. Leave out shots.")
    room = 1 if protocol.is_likelihood else spec.take_int("max_new_tokens", MAX_NEW_TOKENS, low=1)
    bank, read = _read(spec, dataset, subjects, shots)
    notes = [f"Left out: {bank.refused[0]}."] if bank.refused else []
    counts = Counter(not_questions=len(bank.refused))
    usable = _usable(bank.questions, protocol)
    counts["several_right_options_left_out"] = len(bank.questions) - len(usable)
    if len(usable) < len(bank.questions):
        notes.append(
            f"Questions with several right options are left out: {protocol.name} takes one. Ask them with gen."
        )
    exemplars = {subject: _usable(own, protocol) for subject, own in bank.exemplars.items()}
    if shots and not exemplars:
        drawn = set(random.Random(context.seed).sample(range(len(usable)), min(shots, len(usable))))
        exemplars = {"": [question for place, question in enumerate(usable) if place in drawn]}
        usable = [question for place, question in enumerate(usable) if place not in drawn]
        counts["shown_as_exemplars"], read["exemplars"] = len(drawn), f"drawn with seed {context.seed}"
    shown = _shown(spec, usable, exemplars, shots, counts)
    questions = tuple(context.draw(usable))
    if not questions:
        raise InputError(f"--tasks {spec.name}: nothing is left to ask by protocol={protocol.name}. Use protocol=gen.")
    if len(questions) < len(usable):
        read |= {"limit": len(questions), "seed": context.seed}
    counts["duplicates"] = len(questions) - len(set(map(_content, questions)))
    fits = context.fits
    return ChoiceTask(
        name=spec.take_str("label", spec.name),
        writer=Writer(
            protocol, dataset, context.prompting == "chat", None if fits is None else lambda prompt: fits(prompt, room)
        ),
        questions=questions,
        exemplars=shown,
        max_new_tokens=room,
        seed=context.seed,
        means_subjects=dataset in ("ceval", "cmmlu", "cmb"),
        read=read,
        counts=counts,
        notes=tuple(notes),
    )


BUILDERS: dict[str, Builder] = dict.fromkeys((*FOLDERS, *SUITES, *FILES), build)


def _protocol(spec: TaskSpec, dataset: str) -> Protocol:
    protocol = PROTOCOLS[spec.take_choice("protocol", tuple(PROTOCOLS))]
    if not protocol.wording.keys() & {dataset, ""}:
        known = " and ".join(protocol.wording)
        raise InputError(f"--tasks {spec.name}: protocol={protocol.name} is for {known} only. Choose another protocol.")
    return protocol


def _read(spec: TaskSpec, dataset: str, subjects: Sequence[str], shots: int) -> tuple[Bank, dict[str, str | int]]:
    """What the files hold, and what of it decides numbers."""
    read: dict[str, str | int] = {"dataset": dataset}
    if dataset in FOLDERS:
        reader, splits = FOLDERS[dataset]
        folder, split = spec.require_path("the folder that holds dev/ and the split"), spec.take_choice("split", splits)
        if spec.name not in SUITES and (given := spec.take_str("subjects")):
            subjects = given.split("+")
        bank = reader(folder, subjects, split, shots > 0)
        read |= {"split": split, "subjects": "+".join(subjects) or "all"}
    else:
        path, answers, examples = spec.require_path("its file"), None, spec.take_str("exemplars")
        if dataset == "cmb" and (answers := spec.take_str("answers")):
            bank = read_cmb(path, Path(answers))
        else:
            bank = FILES[dataset](path)
        if shots and examples:
            other = FILES[dataset](Path(examples))
            bank.exemplars = {"": other.questions}
            bank.paths += other.paths
            read["exemplars"] = Path(examples).name
    return bank, {**read, "files": digest_files(*bank.paths)}


def _usable(questions: Sequence[Question], protocol: Protocol) -> list[Question]:
    return [question for question in questions if protocol.takes_several or len(question.answer) == 1]


def _shown(
    spec: TaskSpec, asked: Sequence[Question], exemplars: dict[str, list[Question]], shots: int, counts: Counter[str]
) -> dict[str, Sequence[Question]]:
    """The first exemplars for each subject.

    What is asked itself is not shown, unless the dataset has it so: its official exemplars are taken as they are.
    """
    contents, shown = set(map(_content, asked)), dict[str, Sequence[Question]]()
    counts["exemplars_that_are_asked"] = sum(_content(one) in contents for own in exemplars.values() for one in own)
    of_all = [one for one in exemplars.get("", ()) if _content(one) not in contents]
    for subject in {question.subject: None for question in asked} if shots else ():
        shown[subject] = (exemplars.get(subject) or of_all)[:shots] if subject else of_all[:shots]
        if len(shown[subject]) < shots:
            raise InputError(
                f"--tasks {spec.name}: shots={shots}, but {len(shown[subject])} questions can be shown. Ask for fewer."
            )
    return shown


def _content(question: Question) -> tuple[str, ...]:
    return (question.text, *question.options)
