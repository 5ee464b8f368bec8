"""The evaluation job: from options to models, tasks, responses and a report."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine.agreement import ControlGroup
from engine.launch import speak
from engine.mesh import ParallelConfig, start, stop
from engine.model_directory import ModelDirectory, resolve_device, resolve_dtype
from engine.signals import StopSignals
from evals.catalogue import Suite
from evals.contamination import find_overlap
from evals.eval_config import EvaluationConfig
from evals.evaluation import Evaluation, all_settings, collect, conclude
from evals.report import write_report
from evals.respondent import ModelRespondent
from evals.store import Store
from evals.suite import Builder, Judge
from evals.task import Response, Result, Task
from evals.training_texts import check_training_texts
from model.errors import InputError

OpenJudge = Callable[[str, torch.device, torch.dtype], Judge]
"""Opens the reward model of a directory, for this rank's device."""
Plan = tuple[ModelRespondent, Mapping[str, Task]]
"""A model and what it is asked, by label."""
_DECISIVE = ("chimed-engine", "torch", "tokenizers", "sacrebleu", "rouge-score")


def evaluate_models(
    config: EvaluationConfig, open_judge: OpenJudge, more: Mapping[str, Builder] | None = None
) -> list[Evaluation]:
    """Ask every model every task, one model after the other, and write the report.

    All that can be known before the first weight is read, is: directories are opened and tasks built.

    Args:
        more: as in `Suite`.
    Returns:
        what the report says, on rank 0; nothing on the others.
    Raises:
        InputError: anything the user gave that cannot work.
        StoppedError: see `evals.evaluation.collect`.
    """
    runtime = start(ParallelConfig())
    if runtime.world > 1 and config.device not in (None, "cpu", "cuda"):
        raise InputError(f"--device {config.device}: each of {runtime.world} processes has its own. Leave it out.")
    plans = plan_evaluation(config, open_judge, more, str(runtime.device))
    ranks, out = ControlGroup(), Path(config.out)
    ranks.first(f"write {out}", lambda: out.mkdir(parents=True, exist_ok=True))
    evaluations = []
    for respondent, tasks in plans:
        stores = {label: Store(out / respondent.name / label, ranks.rank) for label in tasks}
        responses = _ask(respondent, tasks, stores, ranks)
        respondent.release()
        results = _conclude(tasks, stores, responses, ranks)
        if ranks.rank == 0:
            evaluations.append(_evaluation(respondent, tasks, results))

    def report() -> None:
        if config.contamination:
            evaluations[:] = _look_up(evaluations, config.contamination, config.gram)
        write_report(evaluations, out)

    ranks.first(f"write {out}", report)
    stop()
    return evaluations


def plan_evaluation(
    config: EvaluationConfig,
    open_judge: OpenJudge,
    more: Mapping[str, Builder] | None = None,
    device: str | None = None,
) -> list[Plan]:
    """Who is asked what.

    Args:
        more: as in `Suite`.
        device: where none is given.
    Raises:
        InputError: a directory, a word of --tasks, an option or a file is wrong.
    """
    config.check()
    how: Any = {"device": config.device or device, "dtype": config.dtype, "context": config.context}
    place = resolve_device(how["device"])
    if place.index is not None:
        torch.cuda.set_device(place)  # where kernels start
    directories = {name: ModelDirectory.open(path, config.template) for name, path in config.models().items()}
    judge = None
    if config.reward is not None:
        judge = open_judge(config.reward, place, resolve_dtype(config.dtype, place))
    check_training_texts(config.contamination)
    suite = Suite(config.tasks, config.seed, config.limit, judge, more or {})
    plans: list[Plan] = []
    for name, directory in directories.items():
        respondent = ModelRespondent(directory, name, max_rows=config.max_rows, **how)
        plans.append((respondent, suite.build(respondent.has_template, respondent.encoder.fits)))
    return plans


def _ask(
    respondent: ModelRespondent, tasks: Mapping[str, Task], stores: Mapping[str, Store], ranks: ControlGroup
) -> dict[str, dict[str, Response]]:
    responses = {}
    speak(f"{respondent.name}: {', '.join(tasks)}")
    with StopSignals() as signals:
        for label, task in tasks.items():
            with stores[label].claimed() if ranks.rank == 0 else contextlib.nullcontext():
                responses[label] = collect(task, respondent, stores[label], ranks, signals)
    return responses


def _conclude(
    tasks: Mapping[str, Task],
    stores: Mapping[str, Store],
    responses: Mapping[str, Mapping[str, Response]],
    ranks: ControlGroup,
) -> dict[str, Result]:
    """By label, what the responses are worth, on rank 0."""
    results: dict[str, Result] = {}
    for label, task in tasks.items():

        def work(label: str = label, task: Task = task) -> None:
            results[label] = conclude(task, responses[label], stores[label])

        # Scoring and resampling once do; a reward model judges on all ranks together.
        work() if task.kind == "reward" else ranks.first(f"count {label}", work)
    return results


def _evaluation(respondent: ModelRespondent, tasks: Mapping[str, Task], results: Mapping[str, Result]) -> Evaluation:
    return Evaluation(
        model=respondent.name,
        directory=str(respondent.directory.path),
        fingerprint=respondent.fingerprint,
        results=results,
        settings={label: all_settings(task, respondent, task.requests()) for label, task in tasks.items()},
        kinds={label: task.kind for label, task in tasks.items()},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=dict(_versions()),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def _look_up(evaluations: Sequence[Evaluation], shards: Sequence[str], gram: int) -> list[Evaluation]:
    """The same with what training texts hold of the items. Those are read once, and the items are every model's."""
    items = {(label, item.id): item.texts for label, result in evaluations[0].results.items() for item in result.items}
    names = {f"{label}\n{name}": (label, name) for label, name in items}
    found = find_overlap({key: items[names[key]] for key in names}, shards, gram)
    contamination = {
        label: dataclasses.replace(
            found, items={names[key][1]: one for key, one in found.items.items() if names[key][0] == label}
        )
        for label in evaluations[0].results
    }
    return [dataclasses.replace(evaluation, contamination=contamination) for evaluation in evaluations]


def _versions() -> dict[str, str]:
    found = {}
    for name in _DECISIVE:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
