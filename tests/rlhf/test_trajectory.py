"""Answers as they were sampled: ids, alignment and masks."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from rlhf.trajectory import Trajectory
from tests.rlhf.trajectories import END, some_samples, spans


def test_ids_are_those_that_were_sampled() -> None:
    samples = some_samples()
    trajectory = Trajectory.of(samples, "cpu")
    for sample, begin, end in zip(samples, trajectory.bounds[:-1], trajectory.bounds[1:], strict=True):
        assert trajectory.tokens[begin:end].tolist() == sample.prompt_ids + sample.answer_ids
    assert trajectory.prompt.tolist() == [sample.prompt for sample in samples]
    assert trajectory.sample.tolist() == [sample.sample for sample in samples]


def test_actions_are_the_answers_tokens_seen_from_the_token_before_them() -> None:
    samples = some_samples()
    trajectory = Trajectory.of(samples, "cpu")
    expected = np.zeros(len(trajectory.tokens), bool)
    for sample, begin in zip(samples, trajectory.bounds, strict=False):
        for action in range(len(sample.answer_ids)):
            t = begin + len(sample.prompt_ids) - 1 + action
            assert trajectory.tokens[t + 1] == sample.answer_ids[action]
            assert trajectory.sampled_logprob[t] == np.float32(sample.logprobs[action])
            expected[t] = True
    assert np.array_equal(trajectory.actions.numpy(), expected)
    assert not trajectory.sampled_logprob[~trajectory.actions].any()


def test_the_end_token_is_an_action_and_the_last_one() -> None:
    samples = some_samples()
    trajectory = Trajectory.of(samples, "cpu")
    assert trajectory.actions[trajectory.last_action].all() and not trajectory.actions[trajectory.last_token].any()
    last = trajectory.tokens[trajectory.last_action + 1]
    assert (last[trajectory.ended] == END).all() and trajectory.ended.any()
    # What was cut stays as it was: nobody puts an end there.
    cut = [sample.answer_ids[-1] for sample in samples if sample.end_reason == "length"]
    assert last[~trajectory.ended].tolist() == cut and END not in cut


def test_masks_come_from_lengths_not_from_ids() -> None:
    """End and padding tokens within prompts and answers change nothing."""
    samples = some_samples()
    odd = [
        dataclasses.replace(sample, prompt_ids=[END] * len(sample.prompt_ids), answer_ids=[0] * len(sample.answer_ids))
        for sample in samples
    ]
    plain, other = (Trajectory.of(some, "cpu") for some in (samples, odd))
    assert torch.equal(plain.actions, other.actions)
    assert torch.equal(plain.last_action, other.last_action)


def test_a_prompt_and_an_answer_of_one_token_each() -> None:
    one = dataclasses.replace(some_samples(1)[0], prompt_ids=[5], answer_ids=[END], logprobs=[-0.5])
    trajectory = Trajectory.of([one, one], "cpu")
    assert trajectory.actions.tolist() == [True, False, True, False]
    assert trajectory.last_action.tolist() == [0, 2]


def test_sums_by_sample_and_back() -> None:
    trajectory = Trajectory.of(some_samples(), "cpu")
    values = torch.randn(len(trajectory.tokens)) * trajectory.actions
    expected = [values[span].double().sum() for span in spans(trajectory)]
    torch.testing.assert_close(trajectory.sum_by_sample(values.double()), torch.stack(expected))
    numbers = torch.arange(trajectory.num_samples).float() + 1
    spread = trajectory.by_token(numbers)
    for number, span in zip(numbers, spans(trajectory), strict=True):
        assert (spread[span] == number).all()
    assert not spread[~trajectory.actions].any()
