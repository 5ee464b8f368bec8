"""Scores: read at the last token, by a model or by anybody's function, and what clipping and penalties make of them."""

from __future__ import annotations

import json
import sys
import traceback
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.mesh import ParallelConfig, Runtime, start, stop
from model.errors import InputError
from rlhf.judges import FunctionJudge
from rlhf.ppo_config import RewardConfig
from rlhf.reward_model import open_reward_model
from rlhf.scores import Answer, Scorer, names_function, open_scorer
from rlhf.trajectory import Trajectory
from tests.ranks import run_ranks
from tests.rlhf.small_ppo import CONTEXT, small_recipe, small_samples, small_tokenizer, write_small_roles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_roles(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield start(ParallelConfig())
    stop()


def scored(folder: Path, precision: Any = "fp32") -> tuple[list[float], list[float]]:
    """Raw and final scores of small answers by the reward model, sharded over the ranks there are."""
    runtime = start(ParallelConfig())
    config, (tokenizer, template) = small_recipe(folder), small_tokenizer(folder)
    facts = open_reward_model(folder / "rm", tokenizer, template)
    scorer = open_scorer(RewardConfig(), facts, CONTEXT, 2 * CONTEXT, config, precision, runtime)
    prompts, samples = small_samples()
    raw, final = scorer.score(prompts, samples, Trajectory.of(samples, "cpu"), runtime)
    assert raw.dtype == final.dtype == torch.float32
    return raw.tolist(), final.tolist()


def one_by_one(folder: Path) -> list[float]:
    """The same scores by transformers, each answer by itself, normalised as the directory says."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm", dtype=torch.float32).eval()
    ids = [torch.tensor([sample.prompt_ids + sample.answer_ids]) for sample in small_samples()[1]]
    with torch.no_grad():
        return [(model(row).logits.item() - 0.25) / 2.0 for row in ids]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_reward_model_reads_the_last_token_whatever_is_packed_beside_it(folder: Path, world: int) -> None:
    found = run_ranks(scored, world, folder)
    assert all(other == found[0] for other in found)
    np.testing.assert_allclose(found[0][0], one_by_one(folder), atol=1e-5)


def test_a_reward_model_in_bf16_agrees_with_itself_in_fp32(folder: Path, runtime: Runtime) -> None:
    # Its head computes in fp32, so what is lost is the trunk's eight bits of mantissa.
    np.testing.assert_allclose(scored(folder, "bf16")[0], scored(folder)[0], atol=2 * 2**-8)


def test_scores_of_a_reward_model_are_clipped_at_five_deviations(folder: Path, runtime: Runtime) -> None:
    facts = open_reward_model(folder / "rm")
    facts = replace(facts, config=replace(facts.config, score_std=1e-3))
    prompts, samples = small_samples()
    trajectory = Trajectory.of(samples, "cpu")
    for clip, bound in ((None, 5.0), (70.0, 70.0), (0.0, float("inf"))):
        options = RewardConfig(clip=clip, missing_end_penalty=0.0)
        scorer = open_scorer(options, facts, CONTEXT, 2 * CONTEXT, small_recipe(folder), "fp32", runtime)
        raw, final = scorer.score(prompts, samples, trajectory, runtime)
        assert raw.abs().max() > 70
        assert torch.equal(final, raw.clamp(-bound, bound))


def test_the_penalty_of_a_missing_end_is_not_clipped_away(runtime: Runtime) -> None:
    prompts, samples = small_samples()
    trajectory = Trajectory.of(samples, "cpu")
    given = torch.tensor([9.0, -9, 9, -9, 1, -9, 2])
    raw, final = Scorer(lambda *_: given, clip=3.0, missing_end_penalty=2.0).score(
        prompts, samples, trajectory, runtime
    )
    assert raw is given
    assert final.tolist() == [3, -3, 3 - 2, -3, 1, -3 - 2, 2]  # every third has no end
    _, as_it_is = Scorer(lambda *_: given).score(prompts, samples, trajectory, runtime)
    assert torch.equal(as_it_is, given)


def test_running_normalisation_is_that_of_all_scores_so_far_and_its_state_goes_on(runtime: Runtime) -> None:
    prompts, samples = small_samples()
    trajectory = Trajectory.of(samples, "cpu")
    rounds = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    current = iter(rounds)
    scorer = Scorer(lambda *_: next(current), clip=1.0, normalise=True)
    for number in range(1, 5):
        if number == 3:
            state = json.loads(json.dumps(scorer.state()))
            scorer = Scorer(lambda *_: next(current), clip=1.0, normalise=True)
            scorer.load(state)
        _, final = scorer.score(prompts, samples, trajectory, runtime)
        seen = rounds[:number].double()
        expected = (rounds[number - 1].double() - seen.mean()) / seen.std(correction=0)
        np.testing.assert_allclose(final, expected.clamp(-1, 1), atol=1e-5)
    constant = Scorer(lambda *_: torch.full((7,), 3.0), normalise=True)
    assert constant.score(prompts, samples, trajectory, runtime)[1].tolist() == [0.0] * 7


# Functions


def by_length(answers: list[Answer]) -> list[float]:
    return [float(len(answer.text) + answer.fields["row"] - 100 * answer.is_complete) for answer in answers]


def of_torch(answers: list[Answer]) -> torch.Tensor:
    return torch.arange(len(answers))


def of_numpy(answers: list[Answer]) -> list[np.float32]:
    return [np.float32(at) for at in range(len(answers))]


def failing(answers: list[Answer]) -> list[float]:
    open("/no/such/file").close()
    return []


WRONG: dict[str, Any] = {"text": "good", "dictionary": {}, "nothing": None, "number": 3.0, "short": [1.0] * 6}
WRONG |= {"word": [1.0] * 6 + ["2"], "nan": [1.0] * 6 + [float("nan")], "endless": [float("inf")] * 7}
WRONG |= {"missing": [1.0] * 6 + [None], "nested": [[1.0]] * 7}


def wrong(kind: str) -> Any:
    return WRONG[kind]


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module is found under a short name, as a user's would be."""
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])


def judged(source: str, runtime: Runtime) -> list[float]:
    prompts, samples = small_samples()
    return FunctionJudge(source)(prompts, samples, Trajectory.of(samples, "cpu"), runtime).tolist()


def test_a_function_is_given_question_answer_end_and_fields(runtime: Runtime) -> None:
    assert judged("mine:by_length", runtime) == [2 + at - 100 * (at % 3 != 2) for at in range(7)]
    assert judged("mine:of_torch", runtime) == judged("mine:of_numpy", runtime) == list(range(7))


def on_ranks() -> tuple[list[float], int]:
    """Scores, and how many answers the function was given on this rank."""
    seen = 0

    def spy(answers: list[Answer]) -> list[float]:
        nonlocal seen
        seen += len(answers)
        return [answer.fields["row"] - len(answers) for answer in answers]

    module = types.ModuleType("spying")
    module.__dict__["spy"] = spy
    sys.modules["spying"] = module
    runtime = start(ParallelConfig())
    prompts, samples = small_samples()
    scores = FunctionJudge("spying:spy")(prompts, samples, Trajectory.of(samples, "cpu"), runtime)
    return scores.tolist(), seen


def test_a_function_sees_all_answers_once_whatever_the_number_of_ranks() -> None:
    expected = [at - 7 for at in range(7)]
    assert run_ranks(on_ranks, 2) == [(expected, 7), (expected, 0)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "returned str. It is given a list of 7 answers and returns a list of as many numbers."),
        ("dictionary", "returned dict."),
        ("nothing", "returned NoneType."),
        ("number", "returned float."),
        ("short", "returned 6 numbers."),
        ("word", "returned '2' for answer 6."),
        ("nan", "returned nan for answer 6."),
        ("endless", "returned inf for answer 0."),
        ("missing", "returned None for answer 6."),
        ("nested", r"returned [1.0] for answer 0."),
    ],
)
def test_what_a_function_must_not_return_is_named(
    kind: str, message: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["mine"], "current", lambda answers: wrong(kind), raising=False)
    with pytest.raises(InputError) as caught:
        judged("mine:current", runtime)
    assert str(caught.value).startswith("The reward function mine:current " + message)


def test_what_a_function_raises_keeps_its_traceback(runtime: Runtime) -> None:
    with pytest.raises(RuntimeError, match="the reward function mine:failing failed") as caught:
        judged("mine:failing", runtime)
    assert "in failing" in "".join(traceback.format_exception(caught.value))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_function_is_looked_for_where_the_command_runs(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text("import no_such_module\n")
    (tmp_path / "own_rewards.py").write_text("def score(answers):\n    return [2.0] * len(answers)\nthree = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert judged("own_rewards:score", runtime) == [2.0] * 7
    for source, message in (
        ("no_rewards:score", "--reward no_rewards:score: there is no module no_rewards here."),
        ("own_rewards.deep:score", "--reward own_rewards.deep:score: there is no module own_rewards.deep here."),
        ("own_rewards:scores", "--reward own_rewards:scores: own_rewards has no function 'scores'."),
        ("own_rewards:three", "--reward own_rewards:three: own_rewards has no function 'three'."),
    ):
        with pytest.raises(InputError) as caught:
            FunctionJudge(source)
        assert str(caught.value).startswith(message)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        FunctionJudge("my_rewards:score")


def test_a_source_is_a_directory_or_a_function(tmp_path: Path) -> None:
    assert not names_function(str(tmp_path))
    assert names_function("a.b:c")
    for source in ("ckpt/nothing", "a:b:c", "a b:c", ":c", "a:", "a/b.py:c"):
        with pytest.raises(InputError, match="neither a directory nor a function"):
            names_function(source)
