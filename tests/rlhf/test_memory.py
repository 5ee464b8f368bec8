"""The plan of an iteration against the bytes that its phases really hold, on real tensors, op by op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.dry_run import PlanConfig
from engine.job import StepShape
from engine.lora import LoraConfig
from engine.memory import Moment, Setup, plan, reading
from engine.memory_heads import FP32
from engine.memory_roles import Role, RolesSetup, plan_roles
from model.batch import PackedBatch
from model.config import PRESETS, parameter_shapes
from model.hf import write_model
from model.init import initial_value
from rlhf.memory import plan_ppo, plan_rejection
from rlhf.micro_batches import each_token
from rlhf.ppo_config import (
    AlgorithmConfig,
    KlConfig,
    PpoConfig,
    PpoTrainConfig,
    RewardConfig,
    RolloutConfig,
    ValueConfig,
)
from rlhf.ppo_job import train_ppo
from rlhf.rejection_config import RejectionConfig
from rlhf.trajectory import Sample, Trajectory
from rlhf.update import UpdateOptions, update
from tests.engine.live_bytes import LiveBytes
from tests.engine.test_memory import SCORE, SMALL, hidden_by_ops
from tests.rlhf.trajectories import ALONE, first_pass, make, read, trained

CAPACITY, LENGTH = 512, 256
STEP = Setup(CAPACITY, LENGTH, precision="fp32", micro_batches=2, device="cpu")


def long_samples(count: int) -> list[Sample]:
    """Such as fill micro-batches to the last token."""
    ids = np.random.default_rng(0).integers(3, SMALL.vocab_size, (count, LENGTH)).tolist()
    asked = LENGTH // 4
    return [
        Sample(at, 0, row[:asked], row[asked:], [-5.0] * (LENGTH - asked), "stop", at, 0, "")
        for at, row in enumerate(ids)
    ]


def logprobs(model: nn.Module) -> Callable[[PackedBatch], Tensor]:
    return lambda batch: model(batch, 1.0).logprob


def seen(moment: Moment, setup: Setup, name: str) -> int:
    """A moment's bytes without what its op takes unseen."""
    return moment.total - hidden_by_ops(SMALL if name == "policy" else SCORE, setup, moment)


def test_phases_hold_what_is_planned_and_in_the_planned_order() -> None:
    roles = {"policy": Role(SMALL, True), "critic": Role(SCORE, True), "reference": Role(SMALL), "reward": Role(SCORE)}
    planned = {phase.name: phase for phase in plan_roles(RolesSetup(SMALL, roles, STEP, answers=4)).at_work[1:]}
    counted: dict[str, int] = {}
    with LiveBytes() as live:
        models = {name: make(role.config, ALONE) for name, role in roles.items()}
        for name in ("reference", "reward"):
            models[name].requires_grad_(False)
        learners = {name: trained(models[name], ALONE) for name in ("policy", "critic")}
        trajectory = Trajectory.of(long_samples(4), "cpu")
        slices = first_pass(trajectory, 1, CAPACITY, ALONE)
        assert [own.filled for own in slices] == [CAPACITY] * 2

        def count(phase: str, work: Callable[..., Any], *arguments: Any) -> None:
            live.log.clear()
            work(*arguments, ALONE)
            counted[phase] = live.peak()

        count("old logprobs", each_token, trajectory, slices, logprobs(models["policy"]))
        count("reference", each_token, trajectory, slices, logprobs(models["reference"]))
        count("scores", each_token, trajectory, slices, models["reward"])
        count("values", each_token, trajectory, slices, models["critic"])
        trajectory = read(trajectory, models["policy"], models["critic"], slices, ALONE)
        options = UpdateOptions(epochs=1, minibatches=1, micro_batch_tokens=CAPACITY)
        count("policy update", update, learners["policy"], None, trajectory, options, 0, 0)
        count("critic update", update, None, learners["critic"], trajectory, options, 0, 0)

    setup = replace(STEP, loss="logprob")
    for title, phase in planned.items():
        name = {"old logprobs": "policy", "scores": "reward", "values": "critic"}.get(title, title.split()[0])
        role = roles[name]
        if title.endswith("update"):
            moments = plan(role.config, setup).moments
            visible = max(seen(moment, setup, name) for moment in moments)
        else:
            moments = reading(role.config, setup, not role.is_trained)
            results = 5 * FP32 * CAPACITY if role.config.head == "lm" else 0
            visible = max(moments[0].total, moments[1].total - moments[1].head + results)
        expected = phase.total - max(moment.total for moment in moments) + visible
        assert counted[title] == pytest.approx(expected, rel=0.01), title
    assert sorted(planned, key=lambda name: planned[name].total)[-2:] == sorted(counted, key=lambda n: counted[n])[-2:]


NODE = PlanConfig(world=8, device_gib=79.1)
SHAPE = StepShape(4096, 8192, 8)
BASE = PRESETS["ziya2-13b"].with_context(4096)


def test_options_say_who_takes_part() -> None:
    """Who is named but not there yet is of the policy's size."""
    config = PpoConfig(plan=NODE, reward=RewardConfig(source="ckpt/none"), train=PpoTrainConfig(precision="bf16"))
    names = {
        "all four": (config, ["policy", "critic", "reference", "reward"]),
        "a function": (replace(config, reward=RewardConfig(source="rules:score")), ["policy", "critic", "reference"]),
        "no critic": (
            replace(config, ppo=AlgorithmConfig(advantage="group"), rollout=RolloutConfig(samples=4)),
            ["policy", "reference", "reward"],
        ),
        "no reference": (replace(config, kl=KlConfig(coef=0.0)), ["policy", "critic", "reward"]),
    }
    for name, (options, expected) in names.items():
        roles = plan_ppo(options, BASE, SHAPE).setup.roles
        assert list(roles) == expected, name
        assert all(role.config.num_layers == BASE.num_layers for role in roles.values())
        assert [role.is_trained for role in roles.values()] == [name in ("policy", "critic") for name in roles]


def test_options_say_who_waits_in_host_memory_and_what_the_generator_gets() -> None:
    config = PpoConfig(
        plan=NODE,
        reward=RewardConfig(source="ckpt/none", offload=True),
        rollout=RolloutConfig(offload_moments=True, keep=True, cache_gib=8.0, rows=16, prompts=96, samples=2),
        ppo=AlgorithmConfig(minibatches=3),
    )
    setup = plan_ppo(config, BASE, SHAPE).setup
    assert {name for name, role in setup.roles.items() if role.is_on_host} == {"policy", "critic", "reward"}
    assert (setup.rows, setup.answers, setup.cache_bytes, setup.keeps_generator) == (16, 192, 8 << 30, True)
    assert setup.step.precision == "bf16" and setup.step.world == 8
    # A third of 192 answers of 4096 tokens, in micro-batches of 8192, over eight ranks.
    assert setup.step.micro_batches == 192 * 4096 // 3 // 8192 // 8


def test_a_directory_s_size_is_taken_where_it_is_there(tmp_path: Path) -> None:
    shapes = parameter_shapes(SCORE)
    values = ((name, initial_value(SCORE, name, shape, 0)) for name, shape in shapes.items())
    write_model(tmp_path / "rm", SCORE, values, torch.float32)
    (tmp_path / "rm" / "model.safetensors").unlink()  # its size is in config.json
    config = PpoConfig(plan=NODE, reward=RewardConfig(source=str(tmp_path / "rm")), value=ValueConfig(model="1b"))
    roles = plan_ppo(config, SMALL, StepShape(256, 512, 8)).setup.roles
    assert roles["reward"].config.num_parameters == SCORE.num_parameters
    assert roles["critic"].config.num_layers == PRESETS["1b"].num_layers
    assert roles["critic"].config.head == "score"


def test_13b_with_adapters_of_rank_16_fits_four_80_gb_cards_and_all_of_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # where the demo has left no reward model of its own size
    for rank, verdict in ((16, "it fits the 79.1 GiB"), (0, "it does not fit the 79.1 GiB")):
        four = PlanConfig(world=4, device_gib=79.1)
        train_ppo(PpoConfig(model="ziya2-13b", lora=LoraConfig(rank=rank), dry_run=True, plan=four))
        assert verdict in (said := capsys.readouterr().out)
        assert ("reference" in said) == (rank == 0)


def test_a_frozen_role_has_no_adapters_and_a_reference_only_where_the_policy_is_none() -> None:
    config = PpoConfig(plan=NODE, reward=RewardConfig(source="ckpt/none"), lora=LoraConfig(rank=16))
    planned = plan_ppo(config, BASE, SHAPE)
    assert list(planned.setup.roles) == ["policy", "critic", "reward"]
    base = 2 * BASE.num_parameters / 8
    for phase in planned.at_work:
        for name in ("policy", "critic", "reward"):
            assert phase.parts[f"{name}, frozen"] == pytest.approx(base, rel=0.02)
        assert phase.parts["policy: moments"] == 2 * phase.parts["policy: fp32 weights"] < 0.1 * base
    named = replace(config, kl=KlConfig(reference="ckpt/none"))
    assert "reference" in plan_ppo(named, BASE, SHAPE).setup.roles
    rejection = RejectionConfig(plan=NODE, lora=LoraConfig(rank=16))
    without = RejectionConfig(plan=NODE)
    scores = [plan_rejection(one, BASE, SHAPE).at_work[1].parts for one in (rejection, without)]
    assert scores[0]["reward, frozen"] == scores[1]["reward, frozen"]


def test_rejection_sampling_keeps_its_generator_while_the_reward_model_reads() -> None:
    planned = plan_rejection(RejectionConfig(plan=NODE), BASE, SHAPE)
    assert [phase.name for phase in planned.at_work] == ["rollout", "scores"]
    assert all("keys and values" in phase.parts for phase in planned.phases(int(79.1 * 2**30)))
    assert planned.fits(int(79.1 * 2**30))
