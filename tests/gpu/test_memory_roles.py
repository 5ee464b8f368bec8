"""The phases of an iteration on a GPU hold what the plan says, and the cache gets what it says is left."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.building import Base
from engine.memory import Setup
from engine.memory_roles import Role, RolesSetup, plan_roles
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.publish import gather_full
from engine.shard import free_gathered
from model.batch import PackedBatch
from model.config import PRESETS
from model.generate import Generator
from model.heads import CausalLM, ScalarModel
from model.kv_cache import PAGE
from rlhf.micro_batches import each_token
from rlhf.ppo_config import PpoConfig
from rlhf.roles import Frozen
from rlhf.trajectory import Sample, Trajectory
from rlhf.update import UpdateOptions, update
from tests.rlhf.trajectories import first_pass, make, read, trained

pytestmark = pytest.mark.gpu

LENGTH, CAPACITY = 2048, 8192
# Whose cache for so many rows would be larger than any device.
CONFIG, ROWS = PRESETS["1b"].with_context(LENGTH), 8192


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    gc.collect()
    torch.cuda.empty_cache()
    yield start(ParallelConfig())
    stop()


def some_samples(count: int) -> list[Sample]:
    ids = torch.randint(3, CONFIG.vocab_size, (count, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    asked = LENGTH // 4
    return [
        Sample(at, 0, row[:asked], row[asked:], [-5.0] * (LENGTH - asked), "stop", at, 0, "")
        for at, row in enumerate(ids)
    ]


def logprobs(model: nn.Module) -> Callable[[PackedBatch], Tensor]:
    return lambda batch: model(batch, 1.0).logprob


def test_phases_hold_what_the_device_allocates(runtime: Runtime) -> None:
    score = replace(CONFIG, head="score")
    roles = {
        "policy": Role(CONFIG, True),
        "critic": Role(score, True),
        "reference": Role(CONFIG),
        "reward": Role(score),
    }
    step = Setup(CAPACITY, LENGTH, recompute="none", micro_batches=2)
    planned = plan_roles(RolesSetup(CONFIG, roles, step, rows=ROWS, answers=8))
    device_bytes = torch.cuda.get_device_properties(0).total_memory
    if not planned.fits(device_bytes):
        pytest.skip(f"needs {planned.needed_bytes / 2**30:.0f} GiB of device memory")
    learners = {
        name: trained(make(roles[name].config, runtime, precision="bf16"), runtime) for name in ("policy", "critic")
    }
    job = PpoConfig()
    reference = Frozen(CausalLM, CONFIG, Base(CONFIG, None), job, "bf16", runtime).model
    reward = Frozen(ScalarModel, score, Base(score, None), job, "bf16", runtime).model

    generator = Generator(CONFIG, device=runtime.device, max_rows=ROWS, context=LENGTH)
    generator.load(gather_full(learners["policy"].model.named_parameters(), torch.bfloat16, everywhere=True))
    cached = (generator.cache.data.shape[2] - 1) * PAGE
    assert cached == pytest.approx(planned.cached_tokens(device_bytes), rel=0.05)
    generator.release()

    trajectory = Trajectory.of(some_samples(8), runtime.device)
    slices = first_pass(trajectory, 1, CAPACITY, runtime)
    counted: dict[str, int] = {}

    def count(phase: str, model: nn.Module, work: Callable[..., Any], *arguments: Any) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work(*arguments, runtime)
        free_gathered(model)
        torch.cuda.synchronize()
        counted[phase] = torch.cuda.max_memory_allocated()

    policy, critic = (learners[name].model for name in ("policy", "critic"))
    count("scores", reward, each_token, trajectory, slices, reward)
    count("old logprobs", policy, each_token, trajectory, slices, logprobs(policy))
    count("reference", reference, each_token, trajectory, slices, logprobs(reference))
    count("values", critic, each_token, trajectory, slices, critic)
    trajectory = read(trajectory, policy, critic, slices, runtime)
    for model in (policy, critic):
        free_gathered(model)
    options = UpdateOptions(epochs=1, minibatches=1, micro_batch_tokens=CAPACITY)
    count("policy update", policy, update, learners["policy"], None, trajectory, options, 0, 0)
    count("critic update", critic, update, None, learners["critic"], trajectory, options, 0, 0)

    for phase in planned.at_work[1:]:
        assert counted[phase.name] == pytest.approx(phase.total, rel=0.10), phase.name
