"""The memory plan against the bytes that training steps really hold, counted op by op without a GPU.

Steps run on fake tensors over a process group whose collectives do nothing, so any model and any number of
processes can be looked at; what an op holds while it runs, only the head's, is counted on the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.memory import Moment, Setup, plan
from engine.memory_advice import GIB, advice, describe
from engine.mesh import ParallelConfig, Runtime
from engine.optim import AdamW, OptimConfig
from engine.recompute import Recompute
from engine.shard import Precision, local, parallelize, set_last_micro_batch
from engine.step import next_token_loss
from kernels import linear_cross_entropy, vocabulary
from kernels.backend import Chip, observed_launches
from model.batch import PackedBatch
from model.config import PRESETS, ModelConfig
from model.heads import CausalLM
from tests.engine.live_bytes import LiveBytes

SMALL = ModelConfig(
    vocab_size=1001,
    hidden_size=128,
    intermediate_size=320,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=256,
)
TIED_QWEN3 = replace(SMALL, model_type="qwen3", qk_norm=True, tie_word_embeddings=True, head_dim=48)
BIASED_QWEN2 = replace(SMALL, model_type="qwen2", attention_bias=True, num_kv_heads=4)

# What the plan leaves out: the bounds of documents, and a few scalars.
SLACK = 0.001


@dataclass
class Counted:
    """Bytes of a real step: at rest by category, and at each moment without the optimizer's moments."""

    weights: int
    gradients: int
    optimizer: int
    moments: dict[str, int]
    backward_peak: int


@contextlib.contextmanager
def silent_ranks(setup: Setup) -> Iterator[Runtime]:
    """Rank 0 of a world whose other ranks do not exist."""
    dist.init_process_group("fake", rank=0, world_size=setup.world, store=FakeStore())
    try:
        names = ("replicate", "shard") if setup.replicas > 1 else ("shard",)
        shape = (setup.replicas, setup.shards) if setup.replicas > 1 else (setup.shards,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        yield Runtime(0, setup.world, torch.device("cpu"), mesh)
    finally:
        dist.destroy_process_group()


def empty_pack(tokens: int, context: int) -> PackedBatch:
    row = torch.zeros(tokens, dtype=torch.int64)
    return PackedBatch(row, row.clone(), torch.zeros(5, dtype=torch.int32), row.clone(), 4, context)


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    storages = {local(tensor).untyped_storage()._cdata: local(tensor).untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def run_step(config: ModelConfig, setup: Setup, fake: bool = True) -> Counted:
    """Forward and backward passes of one step of the real model, counting."""
    tensors = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with silent_ranks(setup) as runtime, tensors, LiveBytes() as live:
        with torch.device("meta"):
            model = CausalLM(config)
        parallel = ParallelConfig(replicas=setup.replicas, reshard_after_forward=setup.reshard_after_forward)
        parallelize(model, runtime, parallel, setup.precision, setup.recompute)
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(local(tensor))
        pack = empty_pack(setup.tokens_per_pack, setup.context)
        for index in range(setup.micro_batches):
            live.log.clear()
            set_last_micro_batch(model, index == setup.micro_batches - 1)
            loss = next_token_loss()(model, pack)
            (loss.total / setup.tokens_per_pack).backward()
            del loss
        moments = moments_in(live, config, setup)
        backward_peak = max(total for _, total in live.log[position(live, "chimed.linear_cross_entropy.default") + 1 :])
        optimizer = AdamW(model, OptimConfig())
        return Counted(
            weights=storage_bytes(iter(model.parameters())),
            gradients=storage_bytes(parameter.grad for parameter in model.parameters()),
            optimizer=storage_bytes(iter((*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values()))),
            moments=moments,
            backward_peak=backward_peak,
        )


def position(live: LiveBytes, op: str) -> int:
    return [name for name, _ in live.log].index(op)


def moments_in(live: LiveBytes, config: ModelConfig, setup: Setup) -> dict[str, int]:
    """Find the plan's moments in the log of a micro-batch."""
    loss = position(live, "chimed.linear_cross_entropy.default")
    embedding = position(live, "aten.embedding_dense_backward.default")
    # The op hides its workspace; what it returns, the gradients of hidden states and head, is counted apart.
    returned = setup.number_bytes * config.hidden_size * (setup.tokens_per_pack + config.vocab_size)
    found = {
        "loss": live.log[loss][1] - returned,
        "backward of the head": max(total for name, total in live.log[loss + 1 :] if name == "chimed.scaled.default"),
        "backward of the embedding": live.log[embedding][1],
    }
    layers = reversed(range(config.num_layers))
    for layer, total in zip(layers, live.after("chimed.swiglu_bwd.default"), strict=True):
        found[f"backward of block {layer}"] = total
    if setup.is_wrapped:
        # FSDP's buffers are the only ones that are made with aten.empty after the embedding's gradient.
        found["reduction of the root"] = max(
            total for name, total in live.log[embedding + 1 :] if name == "aten.empty.memory_format"
        )
    return found


def without_optimizer(moment: Moment) -> int:
    return moment.total - moment.optimizer


STEPS = {
    "8 processes": (SMALL, Setup(512, 256, world=8)),
    "selective": (SMALL, Setup(512, 256, world=8, recompute="selective")),
    "full": (SMALL, Setup(512, 256, world=8, recompute="full")),
    "bias, selective": (BIASED_QWEN2, Setup(512, 256, world=2, recompute="selective")),
    "tied, qk-norm, replicas": (TIED_QWEN3, Setup(512, 256, world=8, replicas=2, recompute="selective")),
    "tied, qk-norm, kept": (TIED_QWEN3, Setup(512, 256, world=8)),
    "weights stay gathered": (SMALL, Setup(512, 256, world=4, reshard_after_forward=False)),
    "accumulation": (SMALL, Setup(256, 256, world=4, micro_batches=3)),
    "accumulation, replicas": (SMALL, Setup(256, 256, world=8, replicas=4, micro_batches=2)),
    "one process in bf16": (SMALL, Setup(256, 256)),
    "fp32 on 4 processes": (SMALL, Setup(256, 256, world=4, precision="fp32")),
    "more processes than rows": (SMALL, Setup(256, 256, world=256)),
    "1b": (PRESETS["1b"], Setup(16384, 4096, world=8)),
    "7b": (PRESETS["7b"], Setup(4096, 4096, recompute="selective", micro_batches=2)),
}


@pytest.mark.parametrize("name", STEPS)
def test_plan_holds_what_a_step_holds(name: str) -> None:
    config, setup = STEPS[name]
    planned, counted = plan(config, setup), run_step(config, setup)
    rest = planned.at_rest
    assert (rest.weights, rest.gradients, rest.optimizer) == (counted.weights, counted.gradients, counted.optimizer)
    moments = {moment.name: moment for moment in planned.moments}
    for moment, total in counted.moments.items():
        expected = without_optimizer(moments[moment]) - (moments[moment].head if moment == "loss" else 0)
        assert expected == pytest.approx(total, rel=SLACK), moment
    # Nowhere in the backward pass is there more than at the moments that the plan looks at.
    backward = max(map(without_optimizer, planned.moments[1:-1]))
    assert backward == pytest.approx(counted.backward_peak, rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_plan_holds_what_one_process_in_fp32_holds(recompute: Recompute, micro_batches: int) -> None:
    """Without FSDP, on real tensors."""
    setup = Setup(512, 256, precision="fp32", recompute=recompute, micro_batches=micro_batches, device="cpu")
    planned, counted = plan(SMALL, setup), run_step(SMALL, setup, fake=False)
    rest = planned.at_rest
    assert (rest.weights, rest.gradients, rest.optimizer) == (counted.weights, counted.gradients, counted.optimizer)
    moments = {moment.name: moment for moment in planned.moments}
    for moment, total in counted.moments.items():
        expected = without_optimizer(moments[moment]) - (moments[moment].head if moment == "loss" else 0)
        assert expected == pytest.approx(total, rel=SLACK), moment


def held_by_head(face: Callable[..., Any], config: ModelConfig, setup: Setup) -> int:
    """Bytes at the peak of a face of the op, beside its arguments."""
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    with torch.device("meta"), LiveBytes() as live:
        hidden = torch.empty(setup.tokens_per_pack, config.hidden_size, dtype=dtype)
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        targets = torch.empty(setup.tokens_per_pack, dtype=torch.int64)
        arguments = live.total()
        face(hidden, weight, targets, None, 0.0, True)
    return live.peak() - arguments


@pytest.mark.parametrize(
    ("preset", "tokens", "precision"),
    [
        ("7b", 4096, "bf16"),
        ("7b", 2048, "bf16"),
        ("1b", 16384, "bf16"),
        ("1b", 1024, "bf16"),
        ("7b", 65536, "bf16"),
        ("1b", 8192, "fp32"),
    ],
)
def test_plan_holds_what_the_head_holds(preset: str, tokens: int, precision: Precision) -> None:
    config, setup = PRESETS[preset], Setup(tokens, tokens, precision=precision)
    with observed_launches(lambda *_: None, Chip(90, 132)):
        counted = held_by_head(linear_cross_entropy._linear_cross_entropy_triton, config, setup)
    assert plan(config, setup).moments[0].head == pytest.approx(counted, rel=SLACK)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [256, 4096])
def test_plan_holds_what_the_head_holds_on_a_cpu(
    tokens: int, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vocabulary.WORKSPACE, "meta", vocabulary.WORKSPACE["cpu"])
    config, setup = PRESETS["1b"], Setup(tokens, tokens, precision=precision, device="cpu")
    counted = held_by_head(linear_cross_entropy._linear_cross_entropy, config, setup)
    assert plan(config, setup).moments[0].head == pytest.approx(counted, rel=SLACK)


H100 = int(79.1 * GIB)

TOO_LARGE = {
    "7b on one H100": (PRESETS["7b"], Setup(4096, 4096), H100),
    "13b, long packs": (PRESETS["ziya2-13b"], Setup(16384, 4096, world=8, micro_batches=2), H100),
    "13b, eight replicas": (PRESETS["ziya2-13b"], Setup(8192, 4096, world=32, replicas=8), H100),
    "13b, nothing resharded": (PRESETS["ziya2-13b"], Setup(8192, 4096, world=8, reshard_after_forward=False), H100),
    "13b on four A100 40": (PRESETS["ziya2-13b"], Setup(16384, 4096, world=4, micro_batches=2), int(39.4 * GIB)),
    "1b in fp32 on a 4090": (PRESETS["1b"], Setup(4096, 4096, precision="fp32"), int(23.5 * GIB)),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_advice_makes_it_fit(name: str) -> None:
    config, setup, device_bytes = TOO_LARGE[name]
    planned = plan(config, setup)
    assert not planned.fits(device_bytes)
    changes = advice(planned, device_bytes)
    assert changes
    for change in changes:
        # Planned anew from its setup, and from what it says alone.
        assert plan(config, change.plan.setup).fits(device_bytes)
        assert change.plan.setup == follow(change.options, setup)
        assert change.options in describe(planned, device_bytes)


def follow(options: str, setup: Setup) -> Setup:
    """The setup after doing what the advice says, word by word."""
    passes = setup.tokens_per_pack * setup.micro_batches * setup.world
    fields = {"precision": str, "recompute": str, "replicas": int, "micro_batch_tokens": int}
    changes: dict[str, Any] = {}
    words = iter(options.split())
    for word in words:
        if word == "on":
            changes["world"] = int(next(words))
            assert next(words) == "processes"
        elif word == "--parallel.reshard_after_forward":
            changes["reshard_after_forward"] = next(words) == "true"
        else:
            name = word.rpartition(".")[2]
            changes["tokens_per_pack" if name == "micro_batch_tokens" else name] = fields[name](next(words))
    followed = replace(setup, **changes)
    return replace(followed, micro_batches=-(-passes // (followed.tokens_per_pack * followed.world)))


def test_cheap_advice_comes_first() -> None:
    config, setup, device_bytes = TOO_LARGE["13b, long packs"]
    options = [change.options for change in advice(plan(config, setup), device_bytes)]
    assert options == ["--train.micro_batch_tokens 4096", "--train.recompute full"]


def test_changes_are_taken_together_where_none_is_enough() -> None:
    config, setup, device_bytes = TOO_LARGE["13b on four A100 40"]
    (change,) = advice(plan(config, setup), device_bytes)
    assert change.options == "--train.recompute full --train.micro_batch_tokens 4096 on 8 processes"


def test_a_model_too_large_for_any_setting_is_told_so() -> None:
    planned = plan(PRESETS["ziya2-13b"], Setup(4096, 4096))
    assert advice(planned, 3 * GIB) == []
    assert "Use a smaller model." in describe(planned, 3 * GIB)


def test_table_adds_up() -> None:
    planned = plan(PRESETS["7b"], Setup(4096, 4096, world=8, recompute="selective"))
    rows = [line.split() for line in describe(planned, H100).splitlines()[2:8]]
    assert [row[0] for row in rows] == ["weights", "gradients", "optimizer", "activations", "head", "total"]
    for column in (1, 2):
        numbers = [float(row[column]) for row in rows]
        assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.03)
    assert float(rows[-1][2]) == pytest.approx(planned.peak.total / GIB, abs=0.01)
    assert "it fits the 79.1 GiB that are there" in describe(planned, H100)


@pytest.mark.parametrize(
    ("config", "setup", "named"),
    [
        (PRESETS["1b"], Setup(4096, 4096, world=8), "fits a 24 GB card"),
        (PRESETS["7b"], Setup(4096, 4096, world=8, recompute="selective"), "fits A100 40 GB"),
        (PRESETS["7b"], Setup(4096, 4096, recompute="selective"), "fits H200"),
        (PRESETS["ziya2-13b"], Setup(4096, 4096), "fits no single device"),
    ],
)
def test_a_device_is_named_where_none_is_there(config: ModelConfig, setup: Setup, named: str) -> None:
    assert named in describe(plan(config, setup))


def test_documented_plans_are_those_of_the_code() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    starts = tuple(f"| {preset} |" for preset in PRESETS)
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith(starts)]
    assert len(rows) >= 10
    for preset, world, tokens, recompute, *figures, device in ([cell.strip() for cell in row] for row in rows):
        config = PRESETS[preset]
        modes: dict[str, Recompute] = {"none": "none", "selective": "selective", "full": "full"}
        context, mode = config.max_position_embeddings, modes[recompute]
        planned = plan(config, Setup(int(tokens), context, int(world), recompute=mode, micro_batches=2))
        peak = planned.peak
        expected = (planned.at_rest.total, peak.activations + peak.head, peak.total, planned.needed_bytes)
        assert figures == [f"{size / GIB:.1f}" for size in expected]
        assert f"it fits {device}." in describe(planned)
