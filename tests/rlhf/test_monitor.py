"""Numbers of an iteration, by hand; what ends a run; the table of answers across a resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.launch import DivergedError
from engine.loggers import read_rows
from model.chat import Message
from rlhf.monitor import Limits, SampleTable, advantage_statistics, answer_statistics, negative_kl
from rlhf.ppo_config import LimitsConfig
from rlhf.prompts import Prompt
from rlhf.trajectory import Sample, Trajectory
from tests.rlhf.trajectories import made_of

SCORES = torch.tensor([1.0, 1.0, 3.0, -1.0])


def some() -> Trajectory:
    """Two prompts of one token with two answers each, of 1, 3, 2 and 2 tokens; the last one was cut."""
    trajectory = made_of([(1, 1), (1, 3), (1, 2), (1, 2)], prompts=[4, 4, 9, 9])
    nothing = torch.zeros(len(trajectory.tokens))
    return trajectory.replace(
        ended=torch.tensor([True, True, True, False]),
        score=SCORES,
        old_logprob=nothing.masked_fill(trajectory.actions, -1.0),
        reference_logprob=nothing.masked_fill(trajectory.actions, -1.5),
    )


def test_divergence_is_summed_over_an_answer_and_named_apart_from_that_of_a_token() -> None:
    row = answer_statistics(some(), SCORES, "k1")
    assert row["objective/kl"] == pytest.approx(0.5 * 8 / 4)
    assert row["objective/kl_per_token"] == pytest.approx(0.5)
    # The divergence that is used is the one that is reported.
    squared = answer_statistics(some(), SCORES, "k2")
    assert squared["objective/kl"] == pytest.approx(0.5**2 / 2 * 8 / 4)
    assert squared["objective/kl_k1"] == pytest.approx(1.0)


def test_lengths_ends_scores_and_drift_are_those_of_the_answers() -> None:
    row = answer_statistics(some(), SCORES + 7, "k1")
    names = ("response/length_mean", "response/length_min", "response/length_max", "response/truncated")
    assert [row[name] for name in names] == [2.0, 1.0, 3.0, 0.25]
    assert [row[f"objective/score_{name}"] for name in ("mean", "min", "max")] == [8.0, 6.0, 10.0]
    assert [row[f"objective/reward_{name}"] for name in ("mean", "min", "max")] == [1.0, -1.0, 3.0]
    assert row["objective/reward_std"] == pytest.approx(math.sqrt(2))
    assert row["objective/entropy"] == 1.0
    drifted = some().replace(sampled_logprob=torch.where(some().actions, -1.25, 99.0))
    row = answer_statistics(drifted, SCORES, "k1")
    assert (row["sampler/logprob_diff_mean"], row["sampler/logprob_diff_max"]) == (0.25, 0.25)


def test_a_group_of_equal_scores_is_counted() -> None:
    assert answer_statistics(some(), SCORES, "k1")["groups/zero_std"] == 0.5
    alone = made_of([(1, 1), (1, 2)])
    alone = alone.replace(score=torch.ones(2), old_logprob=alone.sampled_logprob)
    assert "groups/zero_std" not in answer_statistics(alone, torch.ones(2), "k1"), "one answer is no group"


def test_explained_variance_is_that_of_actions_alone() -> None:
    trajectory = some()
    returns = torch.where(trajectory.actions, torch.arange(12.0), 1e6)
    values = torch.where(trajectory.actions, 0.5 * torch.arange(12.0), -1e6)
    row = advantage_statistics(trajectory.replace(values=values, returns=returns, advantages=returns - values))
    # returns - values = returns / 2, whose variance is a quarter.
    assert row["value/explained_variance"] == pytest.approx(0.75)
    assert (row["returns/min"], row["returns/max"], row["values/max"]) == (0.0, 10.0, 5.0)


def test_a_critic_of_constant_returns_explains_nothing() -> None:
    trajectory = some()
    ones = torch.ones(12)
    assert advantage_statistics(trajectory.replace(values=ones, returns=ones))["value/explained_variance"] == 0.0


def test_a_divergence_below_zero_beyond_chance_is_said() -> None:
    assert negative_kl({}) is None
    assert negative_kl({"objective/kl_k1": -0.29, "objective/kl_k1_error": 0.1}) is None
    warning = negative_kl({"objective/kl_k1": -0.31, "objective/kl_k1_error": 0.1})
    assert warning is not None and "3.1 standard errors below 0" in warning
    assert negative_kl({"objective/kl_k1": -0.5, "objective/kl_k1_error": math.nan}) is None, "one answer says nothing"


def test_a_limit_ends_the_run_when_it_is_crossed_in_a_row() -> None:
    limits = Limits(LimitsConfig(kl=10.0, patience=2))
    for iteration, kl in enumerate((11.0, 9.0, 11.0), 1):
        limits.look(iteration, {"objective/kl": kl})
    with pytest.raises(DivergedError) as stopped:
        limits.look(4, {"objective/kl": 12.0})
    assert str(stopped.value) == (
        "Stopped at iteration 4: the policy is 12 nats an answer from the reference; --limits.kl is 10, and this was "
        "iteration 2 in a row beyond it. Raise --kl.coef or lower --optim.lr; or move the limit. The last checkpoint "
        "is intact."
    )


@pytest.mark.parametrize(
    ("option", "number", "good", "bad"),
    [
        ("kl", "objective/kl", 1.0, math.nan),
        ("entropy", "objective/entropy", 0.5, 0.4),
        ("truncated", "response/truncated", 0.5, 0.6),
        ("length", "response/length_mean", 0.5, 0.6),
        ("reward_std", "objective/score_std", 0.5, 0.4),
    ],
)
def test_every_limit_has_its_side(option: str, number: str, good: float, bad: float) -> None:
    bound = {option: 1.0 if option == "kl" else 0.5}
    nothing = dict.fromkeys(("kl", "entropy", "truncated"))
    limits = Limits(LimitsConfig(**{**nothing, **bound, "patience": 1}))
    limits.look(1, {number: good})
    with pytest.raises(DivergedError, match=f"--limits.{option} is"):
        limits.look(2, {number: bad})
    Limits(LimitsConfig(**{**nothing, "patience": 1})).look(1, {number: bad})


def test_a_resumed_run_goes_on_counting() -> None:
    limits = Limits(LimitsConfig(kl=10.0, patience=2))
    limits.look(1, {"objective/kl": 11.0})
    with pytest.raises(DivergedError):
        Limits(LimitsConfig(kl=10.0, patience=2), limits.counts).look(2, {"objective/kl": 11.0})


def test_the_table_holds_some_answers_of_each_iteration_and_drops_what_a_checkpoint_does_not_know(
    tmp_path: Path,
) -> None:
    samples = [Sample(4 + 5 * (n // 2), n % 2, [5], [7, 2], [-1.0, -1.0], "stop", 0, 0, f"答{n}") for n in range(4)]
    prompts = [Prompt(position, [5], (Message("user", f"问{position}"),), {}) for position in (4, 9)]
    trajectory = Trajectory.of(samples, "cpu")
    nothing = torch.zeros(len(trajectory.tokens))
    trajectory = trajectory.replace(score=SCORES - 1, old_logprob=trajectory.sampled_logprob, reference_logprob=nothing)
    path = tmp_path / "samples.jsonl"
    for step in (1, 2, 3):
        table = SampleTable(path, 9, 2, is_main=True)
        table.write(step, prompts, samples, trajectory, SCORES)
        table.write(step, prompts, samples, trajectory, SCORES, is_held_out=True)
    SampleTable(path, 9, 2, is_main=False).write(4, prompts, samples, trajectory, SCORES)
    rows = read_rows(path)
    assert [(row["step"], row["held_out"]) for row in rows] == [
        (s, h) for s in (1, 2, 3) for h in (False,) * 2 + (True,) * 2
    ]
    assert rows[1] == {
        "step": 1,
        "held_out": False,
        "prompt": [{"role": "user", "content": "问9"}],
        "answer": "答2",
        "score": 3.0,
        "reward": 2.0,
        "kl": -2.0,
        "tokens": 2,
        "end": "stop",
        "position": 9,
        "sample": 0,
    }
    SampleTable(path, 2, 2, is_main=True)
    # The look after iteration 2 comes after its checkpoint: it is repeated.
    assert [(row["step"], row["held_out"]) for row in read_rows(path)] == [
        *[(1, False)] * 2,
        *[(1, True)] * 2,
        *[(2, False)] * 2,
    ]
