"""Options of PPO that cannot work are refused in a sentence that names them."""

from __future__ import annotations

import pytest
import torch

from engine.config import parse
from engine.guard import Guard
from model.errors import InputError
from rlhf.ppo_config import PpoConfig

ALIASES = {"data": "data.paths", "reward": "reward.source"}


def options(*words: str) -> PpoConfig:
    config = parse(PpoConfig, words, "ppo.py", ALIASES)
    config.check()
    return config


def test_the_reward_may_be_a_directory_or_a_function() -> None:
    assert options("--reward", "ckpt/other").reward.source == "ckpt/other"
    assert options("--reward", "rules:score").reward.source == "rules:score"


def test_adam_is_that_of_the_first_ppo_code() -> None:
    recipe = options()
    assert (recipe.optim.eps, recipe.schedule.kind, recipe.schedule.final_ratio) == (1e-5, "linear", 0.0)


def test_adapters_learn_ten_times_as_fast_unless_rates_are_given() -> None:
    def rates(*words: str) -> tuple[float | None, float | None]:
        resolved = options(*words).with_rates()
        return resolved.optim.lr, resolved.value.lr

    assert rates() == (1e-6, 9e-6)
    assert rates("--lora.rank", "16") == pytest.approx((1e-5, 9e-5))
    assert rates("--lora.rank", "16", "--optim.lr", "3e-4", "--value.lr", "2e-4") == (3e-4, 2e-4)


def test_the_reference_is_the_policy_where_adapters_alone_make_the_difference() -> None:
    adapted = ("--lora.rank", "16")
    assert options(*adapted).reference_is_policy
    for words in (
        (),
        (*adapted, "--kl.coef", "0"),
        (*adapted, "--kl.reference", "ckpt/other"),
        (*adapted, "--lora.train_embeddings", "true"),
    ):
        assert not options(*words).reference_is_policy


def test_a_reward_that_is_found_late_is_learnt_from_and_what_is_not_finite_is_not() -> None:
    """While no answer gets the rare reward, the divergence alone has a small gradient; the first signal is a leap."""
    guard = Guard(options().guard, torch.device("cpu"))
    still, quiet, signal = (torch.tensor(value) for value in (0.0, 1e-3, 1.0))
    assert not any(guard.judge(still, quiet) for _ in range(60))
    assert not guard.judge(still, signal) and not guard.judge(signal * 50, signal)
    assert guard.judge(signal, signal / 0) and guard.judge(signal * torch.nan, signal)
    assert parse(PpoConfig, ["--guard.norm_leap", "10"], "ppo.py", ALIASES).guard.norm_leap == 10


def test_the_estimator_has_the_right_gradient_where_it_stands() -> None:
    assert options().kl.kind == "k1"
    assert options("--kl.place", "loss").kl.kind == "k2"
    assert options("--kl.place", "loss", "--kl.estimator", "k3").kl.kind == "k3"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--ppo.advantage group", "--ppo.advantage group compares answers to one prompt, but --rollout.samples is 1"),
        ("--ppo.advantage rloo", "--ppo.advantage rloo compares answers to one prompt, but --rollout.samples is 1"),
        ("--rollout.top_p 0.9", "--rollout.top_p is not an option"),
        ("--rollout.temperature 0", "likeliest tokens alone are the same answer every time"),
        ("--kl.place loss --kl.estimator k1", "pulls nowhere in the loss"),
        ("--kl.coef 0 --kl.target 6", "--kl.target steers a coefficient that is 0 and stays 0"),
        ("--kl.coef -1", "--kl.coef is -1.0. Use 0 or more."),
        ("--lora.rank 8 --lora.dropout 0.1", "--lora.dropout is 0.1, but ratios compare the policy with the one that"),
        ("--ppo.clip 1", "--ppo.clip is 1.0. Use a value below 1"),
        ("--ppo.dual_clip 1", "--ppo.dual_clip is 1.0. Use a value above 1"),
        ("--ppo.lam 1.1", "--ppo.lam is 1.1. Use a value from 0 to 1."),
        ("--ppo.minibatches 3 --rollout.prompts 2", "--ppo.minibatches 3 is more than the 2 answers of an iteration"),
        ("--ptx.coef 0.1", "--ptx.coef and --ptx.paths go together"),
        ("--ptx.paths texts", "--ptx.coef and --ptx.paths go together"),
        ("--train.batch_tokens 4096", "--train.batch_tokens has no meaning here"),
        ("--optim.z_loss 0.1", "--optim.z_loss has no meaning here"),
        ("--limits.patience 0", "--limits.patience is 0. Use 1 or more."),
        ("--value.lr 0", "--value.lr is 0.0. Use 1e-12 or more."),
        ("--log.samples -1", "--log.samples is -1. Use 0 or more."),
    ],
)
def test_what_cannot_work_is_refused(words: str, sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        options(*words.split())
    assert sentence in str(refused.value)


def test_groups_of_two_are_enough() -> None:
    assert options("--ppo.advantage", "group", "--rollout.samples", "2").ppo.advantage == "group"
