"""Options compared by the likelihood of their own texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.model_directory import ModelDirectory
from evals.choice import build
from evals.respondent import ModelRespondent
from evals.suite import BuildContext, TaskSpec
from evals.task import Choose, Task
from model.errors import InputError
from tests.evals.choice_samples import FIRST, write_medqa
from tests.evals.oracle_models import write_oracle_model
from tests.evals.stubs import ask, knowing


def text_task(folder: Path, **options: str) -> Task:
    path = write_medqa(folder / "medqa.jsonl", FIRST)
    return build(TaskSpec("medqa", str(path), {"protocol": "text", **options}), BuildContext("chat"))


def test_the_question_alone_is_shown_and_the_options_texts_are_scored(tmp_path: Path) -> None:
    requests = text_task(tmp_path).requests()
    assert [request.prompt for request in requests] == [f"问题：{sample.text}\n答案：" for sample in FIRST]
    assert [request.options for request in requests] == [sample.options for sample in FIRST]


def test_whoever_finds_the_right_text_likeliest_is_right(tmp_path: Path) -> None:
    task = text_task(tmp_path)
    right = {
        one.id: sample.options["ABCD".index(sample.answer)] for one, sample in zip(task.requests(), FIRST, strict=True)
    }
    assert ask(task, knowing(right)).metrics[0].value == 1.0
    wrong = {id: next(one for one in request.options if one != right[id]) for id, request in _by_id(task).items()}
    assert ask(task, knowing(wrong)).metrics[0].value == 0.0


def test_a_model_chooses_the_text_that_transformers_finds_likeliest(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, task = write_oracle_model(tmp_path / "model", "spm"), text_task(tmp_path)
    respondent = ModelRespondent(ModelDirectory.open(str(directory)), device="cpu")
    result = ask(task, respondent)  # type: ignore[arg-type]
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    for item, request in zip(result.items, task.requests(), strict=True):
        sums = []
        for option in request.options:
            ids, before = (
                tokenizer(text, return_tensors="pt").input_ids[0] for text in (request.prompt + option, request.prompt)
            )
            with torch.inference_mode():
                logprobs = model(ids[None]).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[place - 1, ids[place]].item() for place in range(len(before), len(ids))))
        assert item.answer == "ABCD"[sums.index(max(sums))]


def test_it_shows_no_exemplars(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="protocol=text shows no exemplars"):
        text_task(tmp_path, shots="2")


def _by_id(task: Task) -> dict[str, Choose]:
    return {request.id: request for request in task.requests() if isinstance(request, Choose)}
