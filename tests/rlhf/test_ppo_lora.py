"""PPO of adapters, whole runs: what is kept, what is published, and that neither kills nor ranks leave a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.loggers import read_rows
from engine.loop import CheckpointConfig
from engine.lora import LoraConfig
from engine.manifest import stored_tensors
from engine.mesh import stop
from engine.optim import OptimConfig
from model.errors import InputError
from model.tokenizer import Tokenizer
from rlhf.ppo_config import (
    AlgorithmConfig,
    KlConfig,
    LimitsConfig,
    PpoConfig,
    PpoEvalConfig,
    PpoLogConfig,
    PpoTrainConfig,
    RewardConfig,
    RolloutConfig,
    ValueConfig,
)
from rlhf.ppo_job import train_ppo
from rlhf.sampling_config import PromptDataConfig
from tests.engine.random_kills import check_that_kills_leave_no_trace
from tests.ranks import PATIENCE, start_ranks
from tests.rlhf.small_reward import write_small_reward_model, write_small_sft
from tests.small_adapter import write_small_adapter
from tests.small_base import write_small_conversations

RANK = 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PpoConfig]:
    """Of a policy that is an adapter itself, and a reward model."""
    folder = tmp_path_factory.mktemp("ppo")
    write_small_sft(folder / "base")
    adapter = write_small_adapter(folder / "sft", folder / "base")
    Tokenizer.load(folder / "base").save(adapter)
    write_small_reward_model(folder / "rm", mean=0.2, std=0.5)
    write_small_conversations(folder / "chats.jsonl", 30)

    def made(out: Path, steps: int = 3) -> PpoConfig:
        return PpoConfig(
            model=str(folder / "sft"),
            out=str(out),
            lora=LoraConfig(rank=RANK),
            train=PpoTrainConfig(steps=steps, micro_batch_tokens=256),
            optim=OptimConfig(lr=1e-2, eps=1e-5, weight_decay=0.0),
            checkpoint=CheckpointConfig(every=2),
            eval=PpoEvalConfig(every=6, fraction=0.1),
            log=PpoLogConfig(tensorboard=False, curves=False),
            reward=RewardConfig(source=str(folder / "rm")),
            data=PromptDataConfig(paths=[str(folder / "chats.jsonl")]),
            rollout=RolloutConfig(prompts=4, samples=2, max_new_tokens=8, offload_moments=True),
            kl=KlConfig(target=0.01, horizon=20),
            ppo=AlgorithmConfig(epochs=2, minibatches=2),
            value=ValueConfig(lr=1e-2),
            limits=LimitsConfig(truncated=None),
        )

    return made


@pytest.fixture(scope="module")
def made(recipe: Callable[..., PpoConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "ppo"
    train_ppo(recipe(out))
    return out


def adapters(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def test_the_divergence_begins_at_exactly_0_and_so_does_every_update_s_first_step(made: Path) -> None:
    rows = read_rows(made / "metrics.jsonl")
    first, *later = [row for row in rows if "objective/kl" in row]
    looks = [row["held_out/kl"] for row in rows if "held_out/kl" in row]
    assert first["objective/kl"] == 0.0 == looks[0]
    assert all(row["policy/approx_kl_first"] == 0.0 for row in (first, *later))
    assert all(row["objective/kl"] != 0.0 for row in later) and looks[-1] != 0.0


def test_the_policy_is_published_as_an_adapter_of_the_model_it_began_as(
    recipe: Callable[..., PpoConfig], made: Path
) -> None:
    facts = json.loads((made / "adapter_config.json").read_text())
    assert (facts["r"], facts["base_model_name_or_path"]) == (RANK, recipe(made).model)
    assert not list(made.glob("model*.safetensors"))
    assert all(value.any() for value in adapters(made).values())


def test_a_checkpoint_holds_adapters_the_critic_s_head_and_moments_of_both_and_no_frozen_weight(made: Path) -> None:
    stored = stored_tensors(max(made.glob("state/step-*")))
    learnt: dict[str, set[str]] = {"policy": set(), "critic": set()}
    for name in stored:
        role, part, name = name.split(".", 2)
        if part == "model":
            learnt[role].add(name)
            moments = {f"{role}.optimizer.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq")}
            assert moments < stored.keys()
    blocks = {
        f"model.layers.{layer}.{path}.lora_{matrix}"
        for layer in (0, 1)
        for path in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        for matrix in "ab"
    }
    assert learnt == {"policy": blocks, "critic": blocks | {"score.weight"}}


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(
    recipe: Callable[..., PpoConfig], tmp_path: Path, world: int
) -> None:
    def longer(out: Path) -> PpoConfig:
        return recipe(out, steps=16)

    check_that_kills_leave_no_trace(train_ppo, longer, tmp_path, world, kills=3)


def test_two_processes_train_the_adapters_of_one(recipe: Callable[..., PpoConfig], made: Path, tmp_path: Path) -> None:
    for process in (processes := start_ranks(train_ppo, 2, recipe(tmp_path / "two"))):
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    for name, value in adapters(made).items():
        assert (adapters(tmp_path / "two")[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def test_a_reward_model_that_has_changed_is_no_base_for_the_critic_s_adapters(
    recipe: Callable[..., PpoConfig], made: Path, tmp_path: Path
) -> None:
    path = Path(recipe(made).reward.source) / "model.safetensors"
    before = path.read_bytes()
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    try:
        with pytest.raises(InputError, match=r"trained beside weights that lay in .*rm, .*Give --value\.model"):
            train_ppo(recipe(made, steps=4))
    finally:
        path.write_bytes(before)
        stop()
