"""What carries the loop: a watchdog that is told of work, and a run that is the same run when it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.mesh import stop
from engine.watchdog import Watchdog
from model.errors import InputError
from rlhf.draws import Draws
from rlhf.ppo_config import AlgorithmConfig, PpoConfig, RolloutConfig
from rlhf.ppo_job import train_ppo
from rlhf.rejection_report import describe_gain
from rlhf.session import describe_look
from tests.rlhf.small_ppo import write_small_roles
from tests.rlhf.toys import small_model, toy
from tests.small_base import write_small_conversations


def test_the_watchdog_hears_of_every_token_and_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a phase may take longer than it waits: 6 answers of 3 tokens, then 2 x 3 steps of critic and policy each."""
    heard: Counter[str] = Counter()
    monkeypatch.setattr(Watchdog, "beat", lambda self, doing: heard.update([doing]))
    problem = toy(
        tmp_path,
        small_model(8, 4),
        [[1]],
        lambda ids: 0.0,
        1,
        rollout=RolloutConfig(prompts=6, max_new_tokens=3),
        ppo=AlgorithmConfig(epochs=2, minibatches=3),
    )
    problem.run()
    assert heard["in rollout of iteration 1"] == 1 + 6 * 3
    assert heard["in update of iteration 1"] == 1 + 2 * 2 * 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PpoConfig:
    """A run of one iteration, and its recipe for one more."""
    folder = write_small_roles(tmp_path_factory.mktemp("made"))
    config = PpoConfig(model=str(folder / "sft"), out=str(folder / "ppo"))
    config.reward.source = str(folder / "rm")
    config.data.paths = [str(write_small_conversations(folder / "chats.jsonl", 12))]
    config.rollout = RolloutConfig(prompts=2, max_new_tokens=2)
    config.eval.fraction, config.train.steps, config.train.micro_batch_tokens = 0.0, 1, 256
    config.log.tensorboard = config.log.curves = False
    train_ppo(config)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))


def test_a_finished_run_called_again_says_that_nothing_is_trained(
    made: PpoConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    once = dataclasses.replace(made, train=dataclasses.replace(made.train, steps=1))
    recipe = Path(made.out, "config.yaml").read_bytes()
    train_ppo(dataclasses.replace(once, optim=dataclasses.replace(made.optim, beta2=0.9)))
    said = capsys.readouterr().err
    assert f"Resuming {made.out} after iteration 1. 1 of 1 iterations had been done before: nothing is trained." in said
    assert "optim.beta2 " in said and "-> 0.9.\nIt was not trained with that." in said
    assert Path(made.out, "config.yaml").read_bytes() == recipe


@pytest.mark.parametrize(
    ("name", "option", "inner", "value"),
    [
        ("seed", "seed", None, 1),
        ("model", "model", None, "sft"),
        ("kl.reference", "kl", "reference", "sft"),
        ("reward.source", "reward", "source", "rm"),
    ],
)
def test_a_run_goes_on_with_its_own_seed_reference_and_reward(
    made: PpoConfig, name: str, option: str, inner: str | None, value: Any
) -> None:
    """Those of other directories fit as well, and what a run has learnt from one reward is not of another."""
    if isinstance(value, str):
        other = Path(made.out).parent / f"other-{value}"
        if not other.exists():
            other.symlink_to(other.with_name(value))
        value = str(other)
    if inner is not None:
        value = dataclasses.replace(getattr(made, option), **{inner: value})
    with pytest.raises(InputError, match=f"its checkpoint was trained with {name}"):
        train_ppo(dataclasses.replace(made, **{option: value}))
    stop()


def test_a_mean_over_one_prompt_has_no_interval() -> None:
    row = {"held_out/reward": 0.842, "held_out/reward_interval": 0.0, "held_out/kl": 0.1, "held_out/kl_interval": 0.0}
    assert describe_look(row, 1) == "reward 0.842, kl 0.1 (one prompt)"
    assert describe_look({**row, "held_out/reward_interval": 0.02}, 2) == "reward 0.842 ± 0.02, kl 0.1 ± 0"


def test_a_gain_on_one_prompt_has_no_interval(tmp_path: Path) -> None:
    for name, score in (("before", 0.25), ("after", 0.75)):
        (tmp_path / name).write_text(json.dumps({"responses": [{"score": score}]}) + "\n")
    said = describe_gain(Draws(tmp_path / "before"), Draws(tmp_path / "after"))
    assert said.endswith("0.2500 before, 0.7500 after; gain +0.5000 (one prompt)")
