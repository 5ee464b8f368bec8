"""A model directory responds: each kind of request, alone and among others."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.chatting import SamplingConfig
from engine.model_directory import ModelDirectory
from evals.respondent import ModelRespondent
from evals.task import Answer, Answered, Choose, Chosen, Read, Scored
from evals.task import Request as Asked
from model.chat import Message
from model.errors import InputError
from model.generate import Request
from model.sampling import SamplingOptions
from tests.evals.small_tasks import SmallTask
from tests.small_base import FINDINGS, write_small_base
from tests.tools.small_chat import end_answers_at, transformers_answer, write_small_chat_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_chat_model(tmp_path_factory.mktemp("respondent") / "chat")


@pytest.fixture(scope="module")
def model(directory: Path) -> ModelRespondent:
    return ModelRespondent(ModelDirectory.open(str(directory)))


def greedy(id: str, text: str, **how: object) -> Answer:
    sampling = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=24, **how)  # type: ignore[arg-type]
    return Answer(id, (Message("user", text),), sampling)


def test_any_mix_is_answered_in_its_order(model: ModelRespondent) -> None:
    requests = SmallTask().requests()
    responses = model.respond(requests)
    kinds = {"choose": Chosen, "answer": Answered, "read": Scored}
    assert [type(one) for one in responses] == [kinds[request.id.partition("/")[0]] for request in requests]
    for request, response in zip(requests, responses, strict=True):
        if isinstance(request, Choose) and isinstance(response, Chosen):
            assert len(response.logprobs) == len(response.tokens) == len(request.options)
    assert model.respond([]) == []


def test_a_response_depends_on_its_request_alone_but_for_rounding(model: ModelRespondent) -> None:
    requests = SmallTask(count=3).requests()
    for request, beside in zip(requests, model.respond(requests), strict=True):
        (alone,) = model.respond([request])
        if isinstance(alone, Chosen) and isinstance(beside, Chosen):
            assert alone.logprobs == pytest.approx(beside.logprobs, abs=1e-4)
        elif isinstance(alone, Scored) and isinstance(beside, Scored):
            assert alone.logprob == pytest.approx(beside.logprob, abs=1e-3)
        else:
            assert alone == beside


def test_a_greedy_answer_is_that_of_transformers(model: ModelRespondent, directory: Path) -> None:
    for text in ("头晕怎么办？", "咳嗽怎么办？"):
        (response,) = model.respond([greedy("a", text)])
        assert isinstance(response, Answered) and response.tokens > 0
        assert response.text == transformers_answer(directory, [{"role": "user", "content": text}], 24)


def test_the_likeliest_token_and_no_other_is_greedy(model: ModelRespondent) -> None:
    found = 0
    for finding in FINDINGS:
        asked = (Message("user", f"{finding}怎么办？"),)
        prompt = model.encoder.prompt(asked, 1).ids
        (answer,) = model.generator.generate([Request(prompt, SamplingOptions(temperature=0.0, max_new_tokens=1))])
        options = (answer.text or "", "患者", "诊断")
        if model.directory.tokenizer.encode_batch(options[:1], is_continuation=True) == [answer.ids]:
            (chosen,) = model.respond([Choose("a", asked, options)])
            assert isinstance(chosen, Chosen) and chosen.is_greedy == (True, False, False)
            found += 1
    assert found


def test_an_answer_ends_at_its_stop_texts_and_at_every_end_token(directory: Path, tmp_path: Path) -> None:
    (whole,) = ModelRespondent(ModelDirectory.open(str(directory))).respond([greedy("a", "头晕怎么办？")])
    assert isinstance(whole, Answered) and len(whole.text) > 4
    model = ModelRespondent(ModelDirectory.open(str(directory)))
    (stopped,) = model.respond([greedy("a", "头晕怎么办？", stop=[whole.text[3]])])
    assert isinstance(stopped, Answered)
    assert (stopped.text, stopped.end_reason) == (whole.text[: whole.text.index(whole.text[3])], "stop")
    other = write_small_chat_model(tmp_path / "other")
    prompt = model.encoder.prompt((Message("user", "头晕怎么办？"),), 24).ids
    (completion,) = model.generator.generate([Request(prompt, SamplingOptions(temperature=0.0, max_new_tokens=24))])
    end_answers_at(other, completion.ids[4])
    (ended,) = ModelRespondent(ModelDirectory.open(str(other))).respond([greedy("a", "头晕怎么办？")])
    assert isinstance(ended, Answered) and ended.end_reason == "stop"
    assert ended.tokens == completion.ids.index(completion.ids[4]) + 1


def test_draws_depend_on_the_seed_and_the_id(model: ModelRespondent) -> None:
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=24)

    def says(id: str, seed: int) -> str:
        (response,) = model.respond([Answer(id, (Message("user", "头晕怎么办？"),), sampling, seed)])
        assert isinstance(response, Answered)
        return response.text

    assert says("a", 0) == says("a", 0)
    assert len({says("a", 0), says("a", 1), says("b", 0)}) == 3


def test_a_shortened_prompt_is_told_of(directory: Path) -> None:
    model = ModelRespondent(ModelDirectory.open(str(directory)), context=64)
    turns = tuple(
        Message(role, text) for _ in range(9) for role, text in (("user", "头晕怎么办？"), ("assistant", "多休息。"))
    )
    asked: list[Asked] = [
        Answer("turns", (*turns, Message("user", "咳嗽呢？")), SamplingConfig(max_new_tokens=8)),
        Choose("text", "头晕，" * 99, ("A", "B")),
    ]
    answered, chosen = model.respond(asked)
    assert isinstance(answered, Answered) and answered.dropped > 0 and answered.cut == 0
    assert isinstance(chosen, Chosen) and chosen.cut > 0 and chosen.dropped == 0


def test_a_base_without_a_template_is_asked_texts(tmp_path: Path) -> None:
    base = ModelRespondent(ModelDirectory.open(str(write_small_base(tmp_path / "base", 128))))
    assert not base.has_template and base.settings["chat_template"] == "none"
    responses = base.respond(SmallTask(prompting="plain").requests())
    assert len(responses) == 13
    with pytest.raises(InputError, match=r"stores no chat template\. Ask with prompting=plain"):
        base.respond(SmallTask(prompting="chat").requests())
    assert ModelRespondent(ModelDirectory.open(str(tmp_path / "base"), "plain")).has_template


def test_weights_are_read_when_they_are_needed_and_given_back(directory: Path) -> None:
    model = ModelRespondent(ModelDirectory.open(str(directory)), "mine", context=64)
    assert "generator" not in vars(model) and model.name == "mine"
    assert (model.settings["context"], model.settings["dtype"]) == (64, "float32")
    before = model.respond(SmallTask(count=1).requests())
    model.release()
    assert "generator" not in vars(model)
    assert model.respond(SmallTask(count=1).requests()) == before


def test_progress_is_told_and_may_stop_the_work(model: ModelRespondent) -> None:
    ended: list[int] = []
    model.respond([greedy(str(number), "头晕怎么办？") for number in range(3)], ended.append)
    assert sum(ended) == 3 and len(ended) > 3

    def stop(ended: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.respond([greedy("a", "头晕怎么办？")], stop)
    assert len(model.respond([greedy("a", "头晕怎么办？")])) == 1


@pytest.mark.parametrize("request_", [Choose("a", "头痛", ("A", "B")), Read("a", "头痛怎么办")], ids=["choose", "read"])
def test_weights_that_are_no_numbers_are_refused(directory: Path, request_: Choose | Read) -> None:
    model = ModelRespondent(ModelDirectory.open(str(directory)))
    next(model.generator.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"its log-probabilities at a are not finite. .* try --dtype float32"):
        model.respond([request_])
