"""The plan of several roles against what such models, optimizers, generators and caches really hold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.memory import RESERVED_BYTES, Setup
from engine.memory_advice import GIB
from engine.memory_roles import Role, RolesSetup, plan_roles
from engine.memory_roles_advice import describe_roles
from engine.mesh import ParallelConfig
from engine.optim import AdamW, OptimConfig
from engine.shard import Precision, parallelize
from model import kv_cache
from model.config import PRESETS, ModelConfig, parameter_shapes
from model.heads import CausalLM, ScalarModel
from model.kv_cache import PAGE, KVCache, count_pages, free_memory
from model.lora import LoraSpec, add_lora, lora_shapes, merged
from tests.engine.live_bytes import LiveBytes
from tests.engine.test_memory import SMALL, silent_ranks, storage_bytes

H100, H200 = int(79.1 * GIB), int(139.8 * GIB)
STEP = Setup(512, 256, world=8, micro_batches=2)
ADAPTERS = LoraSpec(2, 4.0, trained=("score",))


def four_roles(config: ModelConfig, on_host: tuple[str, ...] = ()) -> dict[str, Role]:
    score = replace(config, head="score")
    roles = {"policy": config, "critic": score, "reference": config, "reward": score}
    return {name: Role(of, name in ("policy", "critic"), name in on_host) for name, of in roles.items()}


BASE = PRESETS["ziya2-13b"]
THIRTEEN = RolesSetup(BASE, four_roles(BASE), Setup(8192, 4096, world=8, recompute="full", micro_batches=2))


def held(role: Role, setup: Setup) -> tuple[int, int]:
    """Bytes of weights and of moments of a role made for real, on rank 0."""
    with torch.device("meta"):
        model = CausalLM(role.config) if role.config.head == "lm" else ScalarModel(role.config)
        if not role.is_trained and setup.precision == "bf16":
            model.model.to(torch.bfloat16)
            if isinstance(model, CausalLM) and model.lm_head is not None:
                model.lm_head.to(torch.bfloat16)
        if role.is_trained and setup.lora is not None:
            add_lora(model, setup.lora)
    with silent_ranks(setup) as runtime, FakeTensorMode(allow_non_fake_inputs=True):
        parallelize(model, runtime, ParallelConfig(), setup.precision, "none")
        moments = 0
        if role.is_trained:
            optimizer = AdamW(model, OptimConfig())
            moments = storage_bytes(iter((*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values())))
        return storage_bytes(iter(model.parameters())), moments


WHOLE = Setup(512, 256, world=4, precision="fp32")


@pytest.mark.parametrize("setup", [STEP, WHOLE, replace(STEP, lora=ADAPTERS), replace(WHOLE, lora=ADAPTERS)])
def test_every_phase_holds_what_the_roles_hold(setup: Setup) -> None:
    roles = four_roles(SMALL)
    for phase in plan_roles(RolesSetup(SMALL, roles, setup)).at_work:
        for name, role in roles.items():
            weights, moments = held(role, setup)
            if role.is_trained:
                assert phase.parts[f"{name}: fp32 weights"] + phase.parts.get(f"{name}, frozen", 0) == weights
                assert phase.parts[f"{name}: moments"] == moments
            else:
                assert phase.parts[f"{name}, frozen"] == weights


def test_generator_and_its_cache_are_counted_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_roles(RolesSetup(SMALL, four_roles(SMALL), STEP, rows=4))
    model = CausalLM(SMALL).to(torch.bfloat16)
    assert planned.rollout.parts["generator, whole"] == storage_bytes(iter(model.parameters()))
    # The generator asks what is left when every role and its own weights are there, and nothing else.
    device_bytes = RESERVED_BYTES["cuda"] + planned.rollout_rest + 3_000_000
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: 3_000_000)
    pages = count_pages(SMALL, STEP.context, 4, torch.device("cuda"), torch.bfloat16, None)
    assert planned.cached_tokens(device_bytes) == (pages - 1) * PAGE
    cache = KVCache(SMALL, pages, torch.device("cpu"), torch.bfloat16)
    assert planned.phases(device_bytes)[0].parts["keys and values"] == cache.data.nbytes


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_generator_that_takes_over_adapters_holds_a_module_s_sum_beside_it(precision: Precision) -> None:
    config = replace(SMALL, vocab_size=16)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    shapes = parameter_shapes(config) | lora_shapes(config, ADAPTERS)
    whole = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    with torch.device("meta"):
        model = CausalLM(config)
    add_lora(model, ADAPTERS)
    with LiveBytes() as live:
        for _ in merged(((name, whole[name].clone()) for name, _ in model.named_parameters()), config, ADAPTERS):
            pass
    setup = replace(STEP, precision=precision, lora=ADAPTERS)
    planned = plan_roles(RolesSetup(config, four_roles(config), setup)).rollout.parts["gathered weights"]
    # The plan leaves out the adapters themselves: two matrices, and what is narrower than fp32 once more in that.
    largest = max(math.prod(shape) for name, shape in shapes.items() if "lora_" in name)
    adapters = 2 * largest * (dtype.itemsize + (4 if precision == "bf16" else 0))
    assert planned <= live.peak() <= planned + adapters < 1.03 * planned


def test_a_cache_is_no_larger_than_its_rows_can_use() -> None:
    planned = plan_roles(RolesSetup(SMALL, four_roles(SMALL), STEP, rows=4))
    assert planned.cached_tokens(H100) == 4 * STEP.context


def test_what_waits_in_host_memory_makes_room_in_rollouts_alone() -> None:
    here, waiting = (
        plan_roles(replace(THIRTEEN, roles=four_roles(BASE, names))) for names in ((), ("policy", "critic"))
    )
    parameters = sum(role.config.num_parameters for role in list(THIRTEEN.roles.values())[:2])
    assert here.host_bytes == 0
    assert waiting.host_bytes == pytest.approx(8 * parameters / 8, rel=1e-4)
    assert here.rollout.total - waiting.rollout.total == waiting.host_bytes
    assert here.at_work[1:] == waiting.at_work[1:]
    assert waiting.cached_tokens(H100) > here.cached_tokens(H100) + 20_000


def test_a_frozen_role_on_the_host_is_there_while_it_reads_and_at_no_other_time() -> None:
    planned = plan_roles(replace(THIRTEEN, roles=four_roles(BASE, ("reference",))))
    there = [phase.name for phase in planned.at_work if "reference, frozen" in phase.parts]
    assert there == ["reference"]


def test_a_generator_that_stays_is_there_in_every_phase() -> None:
    for keeps, expected in ((False, 1), (True, 7)):
        phases = plan_roles(replace(THIRTEEN, keeps_generator=keeps)).phases(H100)
        assert len(phases) == 7
        for part in ("generator, whole", "keys and values"):
            assert sum(part in phase.parts for phase in phases) == expected


def test_a_cache_of_a_given_size_is_needed_whole() -> None:
    large, small = (plan_roles(replace(THIRTEEN, cache_bytes=size * GIB)) for size in (30, 4))
    held = [planned.phases(H100)[0].parts["keys and values"] for planned in (large, small)]
    assert held == [planned.page * (size * GIB // planned.page) for planned, size in ((large, 30), (small, 4))]
    assert small.fits(H100) and not large.fits(H100)


def test_a_cache_that_stays_leaves_the_others_a_fifth_of_what_is_left() -> None:
    """So a generator that stays needs a device on which that is enough for an update."""
    stays = plan_roles(replace(THIRTEEN, keeps_generator=True))
    update = stays.at_work[-2]
    device = stays.needed_bytes
    left = device - RESERVED_BYTES["cuda"] - stays.rollout_rest
    cache = stays.phases(device)[-2].parts["keys and values"]
    assert cache == pytest.approx(0.8 * left, abs=stays.page)
    assert update.total + cache == pytest.approx(0.95 * (device - RESERVED_BYTES["cuda"]), rel=1e-3)


def test_without_a_critic_a_reference_or_a_reward_model_there_are_fewer_phases() -> None:
    alone = replace(THIRTEEN, roles={"policy": THIRTEEN.roles["policy"]})
    assert [phase.name for phase in plan_roles(alone).at_work] == ["rollout", "old logprobs", "policy update"]


def test_other_texts_read_between_are_counted() -> None:
    step = replace(THIRTEEN.step, tokens_per_pack=16384, recompute="none")  # the peak is then the loss
    without, mixed = (
        plan_roles(replace(THIRTEEN, step=step, reads_pretraining=reads)).at_work[-2] for reads in (False, True)
    )
    assert mixed.total > without.total  # a cross-entropy forms its gradients at once


def test_a_generator_without_a_policy_beside_it_samples_and_is_judged() -> None:
    """Rejection sampling: the policy is read from its directory into the generator, which stays."""
    reward = Role(replace(BASE, head="score"), is_on_host=True)
    planned = plan_roles(replace(THIRTEEN, roles={"reward": reward}, keeps_generator=True))
    rollout, scores = planned.phases(H100)
    assert rollout.parts["generator, whole"] == scores.parts["generator, whole"] == 2 * BASE.num_parameters
    assert "reward, frozen" in scores.parts and "reward, frozen" not in rollout.parts
    assert not any("policy" in part for part in (*rollout.parts, *scores.parts))


TOO_LARGE = {
    "nothing recomputed": replace(THIRTEEN, step=replace(THIRTEEN.step, recompute="none")),
    "a generator that stays": replace(THIRTEEN, keeps_generator=True),
    "four processes": replace(THIRTEEN, step=replace(THIRTEEN.step, world=4)),
}


def follow(options: str, setup: RolesSetup) -> RolesSetup:
    """The setup after doing what the advice says, word by word."""
    words = iter(options.split())
    for word in words:
        if word == "on":
            count = int(next(words))
            micro_batches = -(-setup.step.micro_batches * setup.step.world // count)
            setup = replace(setup, step=replace(setup.step, world=count, micro_batches=micro_batches))
            assert next(words) == "processes"
            continue
        value = next(words)
        moved = {
            "--rollout.offload_moments": ("policy", "critic"),
            "--kl.offload": ("reference",),
            "--reward.offload": ("reward",),
        }
        if word in moved:
            on_host = {name: replace(setup.roles[name], is_on_host=value == "true") for name in moved[word]}
            setup = replace(setup, roles={**setup.roles, **on_host})
        elif word == "--rollout.keep":
            setup = replace(setup, keeps_generator=value == "true")
        elif word == "--ppo.advantage":
            setup = replace(setup, roles={name: role for name, role in setup.roles.items() if name != "critic"})
        elif word == "--train.recompute":
            setup = replace(setup, step=replace(setup.step, recompute=value))
        elif word == "--train.micro_batch_tokens":
            times = setup.step.tokens_per_pack // int(value)
            step = replace(setup.step, tokens_per_pack=int(value), micro_batches=times * setup.step.micro_batches)
            setup = replace(setup, step=step)
        else:
            assert word == "--value.model" and value == "DIR,"
            assert next(words) == "a"
            smaller = replace(PRESETS[next(words)], head="score")
            setup = replace(setup, roles={**setup.roles, "critic": replace(setup.roles["critic"], config=smaller)})
    return setup


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_advised_makes_it_fit(name: str) -> None:
    planned = plan_roles(TOO_LARGE[name])
    assert not planned.fits(H100)
    lines = describe_roles(planned, H100).splitlines()
    advised = lines[lines.index("Any of these makes it fit:") + 1 :]
    assert advised
    for line in advised:
        options, _, told = line.strip().partition("  (")
        again = plan_roles(follow(options, TOO_LARGE[name]))
        assert again.fits(H100)
        assert told.endswith(f"{again.needed_bytes / GIB:.1f} GiB, {again.cached_tokens(H100):,} cached tokens)")


def test_table_adds_up() -> None:
    planned = plan_roles(THIRTEEN)
    lines = describe_roles(planned, H100).splitlines()
    end = next(at for at, line in enumerate(lines) if line.startswith("  total"))
    rows = [[0.0 if cell == "-" else float(cell) for cell in line.split()[-7:]] for line in lines[2 : end + 1]]
    *parts, totals = rows
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(totals, abs=0.07)
    assert totals == pytest.approx([phase.total / GIB for phase in planned.phases(H100)], abs=0.01)


def test_room_for_cached_tokens_and_what_gives_more_is_told() -> None:
    planned = plan_roles(THIRTEEN)
    moved = plan_roles(replace(THIRTEEN, roles=four_roles(BASE, ("policy", "critic"))))
    said = describe_roles(planned, H200)
    assert f"room for {planned.cached_tokens(H200):,} cached tokens a rank" in said
    told = f"(moments wait in host memory during rollouts; {moved.cached_tokens(H200):,} tokens)"
    assert f"  --rollout.offload_moments true  {told}" in said
    assert f"In host memory wait {moved.host_bytes / GIB:.1f} GiB a rank" in describe_roles(moved, H200)


def test_the_smallest_device_is_told_that_a_plan_fits() -> None:
    for setup in (THIRTEEN, replace(THIRTEEN, keeps_generator=True), replace(THIRTEEN, cache_bytes=30 * GIB)):
        planned = plan_roles(setup)
        assert planned.fits(planned.needed_bytes) and not planned.fits(planned.needed_bytes - (1 << 20))
        assert f"A rank needs {planned.needed_bytes / GIB:.1f} GiB" in describe_roles(planned, H100)


def test_on_a_cpu_the_memory_of_this_machine_is_asked() -> None:
    said = describe_roles(
        plan_roles(RolesSetup(SMALL, four_roles(SMALL), Setup(512, 256, precision="fp32", device="cpu")))
    )
    assert f"it fits the {free_memory(torch.device('cpu')) / GIB:.1f} GiB that are there" in said
    # No more than the rows can use.
    assert f"room for {64 * 256:,} cached tokens a rank: 64 answers of 256 tokens with their prompts." in said
