"""The loop of an evaluation: shares and groups, kills and ranks, and what is counted."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from engine.launch import StoppedError
from engine.model_directory import ModelDirectory
from engine.signals import StopSignals
from evals import evaluation
from evals.evaluation import collect, conclude, evaluate, share
from evals.respondent import Beat, ModelRespondent
from evals.store import Store
from evals.task import Answer, Answered, Choose, Chosen, Read, Request, Response, Scored
from model.errors import InputError
from tests.engine.kill import kill_at_touch, run_to_the_end_or_a_kill
from tests.evals.small_tasks import SmallTask
from tests.evals.stubs import Stub, guessing
from tests.ranks import run_ranks
from tests.tools.small_chat import write_small_chat_model

TASK = SmallTask(count=9, max_new_tokens=8)
GROUP = 4


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_ANSWERS", GROUP)
    monkeypatch.setattr(evaluation, "_SCORES", GROUP)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_chat_model(tmp_path_factory.mktemp("evaluation") / "chat")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(folder: Path, directory: Path | None = None, kill_at: int = 0) -> int:
    """Evaluate TASK in small groups; how often the disk was touched."""
    evaluation._ANSWERS = evaluation._SCORES = GROUP
    respondent = ModelRespondent(ModelDirectory.open(str(directory))) if directory else guessing()
    folder.mkdir(parents=True, exist_ok=True)
    touches = kill_at_touch(kill_at, folder)
    evaluate(TASK, respondent, Store(folder))  # type: ignore[arg-type]
    return touches()


def run_and_tell(folder: Path, directory: Path | None, said: Path) -> None:
    said.write_text(str(run(folder, directory)))


def run_on_rank(folder: Path, directory: Path | None) -> dict[str, Response]:
    import torch.distributed as dist

    evaluation._ANSWERS = evaluation._SCORES = GROUP
    respondent = ModelRespondent(ModelDirectory.open(str(directory))) if directory else guessing()
    folder.mkdir(parents=True, exist_ok=True)
    responses = collect(TASK, respondent, Store(folder, dist.get_rank()))  # type: ignore[arg-type]
    conclude(TASK, responses, Store(folder, dist.get_rank()))  # type: ignore[arg-type]
    return responses


def test_every_request_is_in_one_group_of_one_rank() -> None:
    requests = TASK.requests()
    for world in (1, 2, 3, 8, 40):
        groups = [group for rank in range(world) for group in share(requests, rank, world)]
        assert sorted(one.id for group in groups for one in group) == sorted(one.id for one in requests)
        assert all(0 < len(group) <= GROUP for group in groups)
        assert share(requests, world - 1, world) == share(requests, world - 1, world)


def test_answers_are_dealt_out_evenly_and_scores_by_their_length() -> None:
    answers: list[Request] = [Answer(str(number), "头晕") for number in range(10)]
    assert [sum(map(len, share(answers, rank, 4))) for rank in range(4)] == [3, 3, 2, 2]
    texts: list[Request] = [Read(f"long {number}", "长" * 900) for number in range(4)]
    texts += [Read(f"short {number}", "短" * 9) for number in range(100)]
    sizes = [sum(len(one.text) for group in share(texts, rank, 4) for one in group) for rank in range(4)]  # type: ignore[union-attr]
    assert max(sizes) <= 2 * 1100


def test_prompts_that_begin_alike_lie_together() -> None:
    exemplars = {name: f"以下是关于{name}的单选题。" * 5 for name in ("解剖学", "病毒学")}
    requests = [
        Choose(f"{number}{name}", f"{text}{number}", ("A",)) for number in range(4) for name, text in exemplars.items()
    ]
    groups = share(requests, 0, 1)
    assert [{one.id[1:] for one in group} for group in groups] == [{"病毒学"}, {"解剖学"}]


def test_responses_and_predictions_are_kept_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    stub = guessing()
    result = evaluate(TASK, stub, Store(tmp_path))  # type: ignore[arg-type]
    assert len(stub.seen) == len(TASK.requests()) and result.metrics[0].n == 9
    assert set(contents(tmp_path)) == {"settings.json", "responses.jsonl", "predictions.jsonl"}
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["task"], settings["count"], settings["model"]) == ("small", 9, stub.fingerprint)
    again = guessing()
    assert evaluate(TASK, again, Store(tmp_path)) == result and again.seen == []  # type: ignore[arg-type]


def test_another_request_or_another_model_is_refused(tmp_path: Path) -> None:
    evaluate(TASK, guessing(), Store(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds responses with count 9; now it is 5"):
        evaluate(SmallTask(count=5), guessing(), Store(tmp_path))  # type: ignore[arg-type]

    class Reworded(SmallTask):
        def requests(self) -> list[Request]:  # type: ignore[override]
            return [Read("read", "头晕"), *super().requests()[:-1]]

    with pytest.raises(InputError, match="holds responses with requests_digest"):
        evaluate(Reworded(count=9, max_new_tokens=8), guessing(), Store(tmp_path))  # type: ignore[arg-type]
    other = guessing()
    other.fingerprint = "another"
    with pytest.raises(InputError, match="holds responses with model"):
        evaluate(TASK, other, Store(tmp_path))  # type: ignore[arg-type]


def test_a_kill_at_any_touch_of_the_disk_changes_no_byte(tmp_path: Path) -> None:
    run_to_the_end_or_a_kill(run_and_tell, tmp_path / "unbroken", None, tmp_path / "touches")
    touches, expected = int((tmp_path / "touches").read_text()), contents(tmp_path / "unbroken")
    assert touches > 20
    for number in range(1, touches + 1, 3):
        folder = tmp_path / str(number)
        assert not run_to_the_end_or_a_kill(run, folder, None, number)
        run(folder)
        found = {name: content for name, content in contents(folder).items() if not name.endswith(".tmp")}
        assert found == expected, f"killed at touch {number}"


def test_a_model_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path, directory: Path) -> None:
    run_to_the_end_or_a_kill(run_and_tell, tmp_path / "unbroken", directory, tmp_path / "touches")
    expected = contents(tmp_path / "unbroken")
    for number in (9, 14):  # past the first group of scores, and of answers
        folder = tmp_path / str(number)
        assert not run_to_the_end_or_a_kill(run, folder, directory, number)
        kept = Store(folder).read()
        assert 0 < len(kept) < len(TASK.requests())
        torn = folder / "responses-0.jsonl"
        os.truncate(torn, torn.stat().st_size - 200)  # a group of which a part is whole
        assert 0 < len(kept) - len(Store(folder).read()) < GROUP
        assert run_to_the_end_or_a_kill(run, folder, directory)
        assert contents(folder) == expected


class Neighbourly(Stub):
    """Says how many were asked together, as rounding does in small."""

    def __init__(self) -> None:
        super().__init__(lambda asked: [1.0] * len(asked.options), lambda asked: "", name="neighbourly")

    def respond(self, requests: Any, beat: Beat | None = None) -> list[Response]:
        return [Scored(-1.0, len(requests)) for _ in requests]


def test_a_group_of_which_a_part_is_kept_is_asked_again_whole(tmp_path: Path) -> None:
    responses = collect(TASK, Neighbourly(), Store(tmp_path / "unbroken"))  # type: ignore[arg-type]
    (first, *_) = share(TASK.requests(), 0, 1)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "settings.json").write_bytes((tmp_path / "unbroken" / "settings.json").read_bytes())
    Store(tmp_path / "torn").append([(one.id, responses[one.id]) for one in first[:3]])
    assert collect(TASK, Neighbourly(), Store(tmp_path / "torn")) == responses  # type: ignore[arg-type]
    assert contents(tmp_path / "torn") == contents(tmp_path / "unbroken")


def test_two_ranks_keep_what_one_keeps(tmp_path: Path) -> None:
    run(tmp_path / "one")
    first, second = run_ranks(run_on_rank, 2, tmp_path / "two", None)
    assert first == second == Store(tmp_path / "one").read()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_two_ranks_of_a_model_respond_as_one_but_for_rounding(tmp_path: Path, directory: Path) -> None:
    run(tmp_path / "one", directory)
    ours, theirs = Store(tmp_path / "one").read(), run_ranks(run_on_rank, 2, tmp_path / "two", directory)[0]
    assert list(ours) == list(theirs)
    for name, response in ours.items():
        other = theirs[name]
        if isinstance(response, Chosen) and isinstance(other, Chosen):
            assert response.logprobs == pytest.approx(other.logprobs, abs=1e-4) and response.tokens == other.tokens
        elif isinstance(response, Answered):
            assert response == other


def test_another_number_of_ranks_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    assert not run_to_the_end_or_a_kill(run, folder, None, 12)
    kept = Store(folder).read()
    assert 0 < len(kept) < len(TASK.requests())
    run_ranks(run_on_rank, 2, folder, None)
    run(tmp_path / "one")
    assert contents(folder) == contents(tmp_path / "one")


class Stopping(Stub):
    """Raises a signal while it answers its second group."""

    def __init__(self) -> None:
        super().__init__(lambda asked: [1.0] * len(asked.options), lambda asked: "好", name="stopping")
        self.groups = 0

    def respond(self, requests: Any, beat: Beat | None = None) -> list[Response]:
        self.groups += 1
        if self.groups == 2:
            signal.raise_signal(signal.SIGTERM)
        return super().respond(requests, beat)


def test_a_signal_ends_the_work_when_the_group_is_kept(tmp_path: Path) -> None:
    with StopSignals() as signals, pytest.raises(StoppedError, match="What was answered is kept") as stopped:
        collect(TASK, Stopping(), Store(tmp_path), signals=signals)  # type: ignore[arg-type]
    assert stopped.value.code == 143
    assert len(Store(tmp_path).read()) == 2 * GROUP


def test_an_answer_on_its_way_is_given_up_at_a_signal(tmp_path: Path, directory: Path) -> None:
    model = ModelRespondent(ModelDirectory.open(str(directory)))
    beats = 0

    def respond(requests: Any, beat: Any) -> list[Response]:
        def signalled(ended: int) -> None:
            nonlocal beats
            beats += 1
            if beats == 3:
                signal.raise_signal(signal.SIGINT)
            beat(ended)

        return ModelRespondent.respond(model, requests, signalled)

    model.respond = respond  # type: ignore[method-assign]
    with StopSignals() as signals, pytest.raises(StoppedError) as stopped:
        collect(TASK, model, Store(tmp_path), signals=signals)  # type: ignore[arg-type]
    assert stopped.value.code == 130 and beats == 3
    assert not any(isinstance(response, Answered) for response in Store(tmp_path).read().values())


def test_what_was_shortened_is_counted() -> None:
    responses: dict[str, Response] = {"read": Scored(-1.0, 1)}
    for request in TASK.requests():
        if isinstance(request, Choose):
            count = len(request.options)
            responses[request.id] = Chosen(
                (0.0,) * count, (1,) * count, (True,) * count, 0, int(request.id == "choose/1")
            )
        elif isinstance(request, Answer):
            reason: Any = "length" if request.id == "answer/2" else "stop"
            responses[request.id] = Answered("好", reason, 2, 3 * (request.id < "answer/2"), 0)
    counts = conclude(TASK, responses).counts  # type: ignore[arg-type]
    assert counts == {"prompts_without_oldest_turns": 2, "prompts_cut": 1, "answers_without_end": 1}
