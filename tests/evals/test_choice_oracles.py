"""Multiple choice equals others' programs on the same models: lm-evaluation-harness, by its record
(`record_lm_eval.py`), and transformers, asked here as CMMLU's script asks it."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.model_directory import ModelDirectory
from evals.choice import build
from evals.choice_subjects import CMMLU, CMMLU_PAPER
from evals.choice_task import ChoiceTask
from evals.respondent import ModelRespondent
from evals.suite import BuildContext, parse_spec
from evals.task import Chosen, Result
from tests.evals.choice_samples import write_ceval, write_cmb, write_cmexam, write_cmmlu, write_medqa
from tests.evals.oracle_models import CONTEXT, write_oracle_model
from tests.evals.record_lm_eval import RECORDED, SHORT, condense, fingerprint

# Measured: in fp32 transformers is up to 7e-5 nats from itself in fp64 on these models; so two programs, twice that.
TOLERANCE = 1.4e-4


@cache
def record(name: str) -> dict[str, Any]:
    return dict(json.loads((RECORDED / f"lm_eval_{name}.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracles")
    for kind in ("spm", "bytes"):
        for context in (CONTEXT, SHORT):
            write_oracle_model(folder / f"{kind} {context}", kind, context)
    write_ceval(folder / "ceval")
    write_cmmlu(folder / "cmmlu")
    return folder


@pytest.fixture(scope="module")
def respondents(folder: Path) -> dict[str, ModelRespondent]:
    """By kind of tokenizer and context."""
    return {
        name: opened(folder / name) for kind in ("spm", "bytes") for name in (f"{kind} {CONTEXT}", f"{kind} {SHORT}")
    }


def opened(directory: Path) -> ModelRespondent:
    return ModelRespondent(ModelDirectory.open(str(directory)), device="cpu", dtype="float32")


def asked(word: str, respondent: ModelRespondent) -> tuple[ChoiceTask, dict[str, Chosen], Result]:
    task = build(parse_spec(word), BuildContext(fits=respondent.encoder.fits))
    assert isinstance(task, ChoiceTask)
    requests = task.requests()
    responses: Any = dict(zip((one.id for one in requests), respondent.respond(requests), strict=True))
    return task, responses, task.result(responses)


def by_subject(task: ChoiceTask, responses: dict[str, Chosen]) -> dict[str, list[list[float]]]:
    """Log-probabilities of the letters, in the order of the questions."""
    found: dict[str, list[list[float]]] = {}
    for question in task.questions:
        found.setdefault(question.subject, []).append([*responses[question.id].logprobs])
    return found


@pytest.mark.parametrize("run", record("samples")["runs"])
def test_lm_eval_finds_the_same_likelihoods_and_scores(
    folder: Path, respondents: dict[str, ModelRespondent], run: str
) -> None:
    dataset, kind, shots, context = run.split()
    theirs = record("samples")["runs"][run]
    word = f"{dataset}={folder / dataset},protocol=lm-eval,shots={shots}"
    task, responses, result = asked(word, respondents[f"{kind} {context}"])
    ours = by_subject(task, responses)
    prefix = {"ceval": "ceval-valid_", "cmmlu": "cmmlu_"}[dataset]
    assert {prefix + subject for subject in ours} == set(theirs["tasks"])
    for subject, logprobs in ours.items():
        expected = theirs["tasks"][prefix + subject]
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected["logprobs"]), rtol=0, atol=TOLERANCE)
        right = [int(item.parts["accuracy"][0]) for item in result.items if item.group == subject]
        assert right == expected["right"]
        assert result.groups[subject][0].value == pytest.approx(expected["acc"], rel=1e-12)
    scores = {metric.name: metric.value for metric in result.metrics}
    assert scores["accuracy"] == pytest.approx(theirs["acc"], rel=1e-12)
    assert scores["acc_norm"] == pytest.approx(theirs["acc_norm"], rel=1e-12)


@pytest.mark.parametrize("run", record("cmmlu")["runs"])
def test_lm_eval_chooses_the_same_letter_for_each_of_1166_questions(
    respondents: dict[str, ModelRespondent], real_data: Path, run: str
) -> None:
    files, theirs = real_data / "mcq" / "cmmlu", record("cmmlu")["runs"][run]
    assert fingerprint(files, CMMLU_PAPER) == record("cmmlu")["files"], "recorded on other files"
    kind, shots = run.split()
    task, responses, result = asked(
        f"cmmlu-paper={files},protocol=lm-eval,shots={shots}", respondents[f"{kind} {CONTEXT}"]
    )
    logprobs = by_subject(task, responses).items()
    ours = condense({"tasks": {f"cmmlu_{subject}": {"logprobs": own, "right": []} for subject, own in logprobs}})[
        "tasks"
    ]
    assert len(result.items) == 1166
    assert theirs["margin"] > 2 * TOLERANCE  # no letter leads by less than programs may differ
    for name, expected in theirs["tasks"].items():
        assert ours[name]["choices"] == expected["choices"]
        assert ours[name]["mean_logprobs"] == pytest.approx(expected["mean_logprobs"], abs=TOLERANCE)
        assert result.groups[name.removeprefix("cmmlu_")][0].value == pytest.approx(expected["acc"], rel=1e-12)
    assert result.metrics[0].value == pytest.approx(theirs["acc"], rel=1e-12)


def official_choices(directory: Path, files: Path, subject: str, shots: int) -> str:
    """What CMMLU's script for base models takes to be the answers: the likeliest of the ids of the letters' pieces."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows: dict[str, list[dict[str, str]]] = {}
    for split in ("dev", "test"):
        with open(files / split / f"{subject}.csv", encoding="utf-8", newline="") as file:
            rows[split] = list(csv.DictReader(file))

    def write(row: dict[str, str]) -> str:
        options = "".join(f"\n{letter}. {row[letter]}" for letter in "ABCD")
        return f"题目：{row['Question']}{options}\n答案是："

    header = f"以下是关于{CMMLU[subject]}的单项选择题，请直接给出正确答案的选项。\n\n"
    header += "".join(f"{write(row)}{row['Answer']}\n\n" for row in rows["dev"][:shots])
    letters = tokenizer.convert_tokens_to_ids([*"ABCD"])
    found = ""
    with torch.inference_mode():
        for row in rows["test"]:
            inputs = tokenizer(header + write(row), return_tensors="pt")
            logits = model(input_ids=inputs["input_ids"]).logits[0, -1, letters]
            found += "ABCD"[int(logits.argmax())]
    return found


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("kind", ["spm", "bytes"])
def test_cmmlu_takes_the_letters_that_transformers_finds_likeliest(
    folder: Path, respondents: dict[str, ModelRespondent], kind: str, shots: int
) -> None:
    _, _, result = asked(f"cmmlu={folder / 'cmmlu'},protocol=cmmlu,shots={shots}", respondents[f"{kind} {CONTEXT}"])
    for subject in ("anatomy", "clinical_knowledge"):
        ours = "".join(item.answer for item in result.items if item.group == subject)
        assert ours == official_choices(folder / f"{kind} {CONTEXT}", folder / "cmmlu", subject, shots)


def test_cmmlu_takes_them_on_real_questions(
    folder: Path, respondents: dict[str, ModelRespondent], real_data: Path
) -> None:
    files = real_data / "mcq" / "cmmlu"
    word = f"cmmlu={files},protocol=cmmlu,shots=5,subjects=college_medical_statistics"
    _, _, result = asked(word, respondents[f"spm {CONTEXT}"])
    ours = "".join(item.answer for item in result.items)
    assert ours == official_choices(folder / f"spm {CONTEXT}", files, "college_medical_statistics", 5)


@pytest.mark.parametrize("protocol", ["ceval", "cmmlu", "lm-eval"])
def test_a_short_context_loses_exemplars_or_tokens_and_still_answers(
    folder: Path, respondents: dict[str, ModelRespondent], protocol: str
) -> None:
    word = f"cmmlu={folder / 'cmmlu'},protocol={protocol},shots=5"
    task, responses, result = asked(word, respondents[f"spm {SHORT}"])
    cut = sum(response.cut > 0 for response in responses.values())
    dropped = result.counts.get("exemplars_dropped", 0)
    assert (cut > 0, dropped > 0) == ((True, False) if protocol == "lm-eval" else (False, True))
    assert len(result.items) == len(task.questions)


def test_a_model_answers_every_format_under_every_protocol(tmp_path: Path, real_data: Path) -> None:
    respondent = opened(write_oracle_model(tmp_path / "model", "spm"))
    words = [
        f"ceval={write_ceval(tmp_path / 'ceval')}",
        f"medqa={real_data / 'mcq' / 'medqa_zh_685.jsonl'}",
        f"cmexam={write_cmexam(tmp_path / 'cmexam.csv')}",
        f"cmb={write_cmb(tmp_path / 'cmb.json', tmp_path / 'answers.json')},answers={tmp_path / 'answers.json'}",
        f"medqa={write_medqa(tmp_path / 'medqa.jsonl')},protocol=gen,max_new_tokens=4",
        f"medqa={tmp_path / 'medqa.jsonl'},protocol=paper,max_new_tokens=4",
    ]
    counts = [len(asked(word, respondent)[2].items) for word in words]
    assert counts == [15, 685, 2, 5, 10, 10]
