"""The memory plan against the bytes that training steps really hold, counted op by op without a GPU.

Steps run on fake tensors over a process group whose collectives do nothing, so any model and any number of
processes can be looked at; what an op holds while it runs, only the head's, is counted on the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.masters import Master, masters
from engine.memory import Moment, Setup, plan, reading, stored_bytes
from engine.memory_heads import FP32, head_cost
from engine.mesh import ParallelConfig, Runtime
from engine.optim import AdamW, OptimConfig
from engine.recompute import Recompute
from engine.shard import Precision, fill, local, parallelize, set_last_micro_batch
from engine.step import next_token_loss
from kernels import linear_cross_entropy, linear_logprob, vocabulary
from kernels.backend import Chip, observed_launches
from model.batch import PackedBatch
from model.config import PRESETS, ModelConfig
from model.heads import CausalLM, ScalarModel
from model.lora import LoraSpec, add_lora
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
SCORE = replace(SMALL, head="score")
MANY_WORDS = replace(SMALL, vocab_size=16000, num_layers=1)
LORA = LoraSpec(rank=8, alpha=16.0)
QUERIES_VALUES = replace(LORA, targets=("q_proj", "v_proj"))
OUTPUTS = replace(LORA, targets=("o_proj", "down_proj"))
WORDS = replace(LORA, trained=("embed_tokens", "lm_head"))

CPU = torch.device("cpu")

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
def silent_ranks(setup: Setup, device: torch.device = CPU) -> Iterator[Runtime]:
    """Rank 0 of a world whose other ranks do not exist."""
    dist.init_process_group("fake", rank=0, world_size=setup.world, store=FakeStore())
    try:
        names = ("replicate", "shard") if setup.replicas > 1 else ("shard",)
        shape = (setup.replicas, setup.shards) if setup.replicas > 1 else (setup.shards,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        yield Runtime(0, setup.world, device, mesh)
    finally:
        dist.destroy_process_group()


def empty_pack(tokens: int, context: int, device: torch.device = CPU) -> PackedBatch:
    row = torch.zeros(tokens, dtype=torch.int64, device=device)
    return PackedBatch(row, row.clone(), torch.zeros(5, dtype=torch.int32, device=device), row.clone(), 4, context)


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    """What holds a model's parameters: themselves, or both halves of their masters."""
    for _, one in masters(model.named_parameters()):
        yield from (one.weight, one.remainder) if isinstance(one, Master) else (one,)


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    storages = {local(tensor).untyped_storage()._cdata: local(tensor).untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@contextlib.contextmanager
def sharded(
    config: ModelConfig, setup: Setup, fake: bool = True, frozen: bool = False
) -> Iterator[tuple[CausalLM | ScalarModel, PackedBatch, LiveBytes]]:
    """A model made as jobs make it, a pack for it, and what counts its bytes. frozen: nothing is trained.

    fake: on tensors without values; FSDP wants a device for them, and one process cannot take its own to fake ones.
    """
    tensors = FakeTensorMode(allow_non_fake_inputs=True) if fake and setup.is_wrapped else contextlib.nullcontext()
    device = torch.device("meta") if fake and not setup.is_wrapped else CPU
    with torch.device("meta"):
        model = CausalLM(config) if config.head == "lm" else ScalarModel(config)
        if setup.lora is not None:
            add_lora(model, setup.lora)
        if frozen:
            model.requires_grad_(False)
    with silent_ranks(setup, device) as runtime, tensors, LiveBytes() as live:
        parallel = ParallelConfig(replicas=setup.replicas, reshard_after_forward=setup.reshard_after_forward)
        parallelize(model, runtime, parallel, setup.precision, setup.recompute)
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(local(tensor))
        yield model, empty_pack(setup.tokens_per_pack, setup.context, device), live


def summed_loss(model: CausalLM | ScalarModel, pack: PackedBatch, setup: Setup) -> Tensor:
    """A loss that asks the head for what the setup says."""
    if isinstance(model, ScalarModel):
        return model(pack).sum()
    if setup.loss == "cross_entropy":
        return next_token_loss()(model, pack).total
    out = model(pack, with_entropy=True)
    assert out.entropy is not None
    return (out.logprob - out.entropy).sum()


def run_step(config: ModelConfig, setup: Setup, fake: bool = True) -> Counted:
    """Forward and backward passes of one step of the real model, counting."""
    with sharded(config, setup, fake) as (model, pack, live):
        for index in range(setup.micro_batches):
            live.log.clear()
            set_last_micro_batch(model, index == setup.micro_batches - 1)
            (summed_loss(model, pack, setup) / setup.tokens_per_pack).backward()
        moments = moments_in(live, config, setup)
        backward_peak = max(total for _, total in live.log[begin_of_backward(live) :])
        optimizer = AdamW(model, OptimConfig())
        return Counted(
            weights=storage_bytes(weights_of(model)),
            gradients=storage_bytes(parameter.grad for parameter in optimizer.parameters.values()),
            optimizer=storage_bytes(iter((*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values()))),
            moments=moments,
            backward_peak=backward_peak,
        )


def position(live: LiveBytes, op: str) -> int:
    return [name for name, _ in live.log].index(op)


def begin_of_backward(live: LiveBytes) -> int:
    return position(live, "aten.ones_like.default")


def moments_in(live: LiveBytes, config: ModelConfig, setup: Setup) -> dict[str, int]:
    """Find the plan's moments in the log of a micro-batch; those of the head without what ops of words take."""
    found = at_the_head(live, config, setup)
    layers = reversed(range(config.num_layers))
    for layer, total in zip(layers, live.after("chimed.swiglu_bwd.default"), strict=True):
        found[f"backward of block {layer}"] = total
    if setup.lora is not None and "embed_tokens" not in setup.lora.trained:
        return found
    embedding = position(live, "aten.embedding_dense_backward.default")
    found["backward of the embedding"] = live.log[embedding][1]
    if setup.is_wrapped:
        # FSDP's buffers are the only ones that are made with aten.empty after the embedding's gradient.
        found["reduction of the root"] = max(
            total for name, total in live.log[embedding + 1 :] if name == "aten.empty.memory_format"
        )
    return found


def at_the_head(live: LiveBytes, config: ModelConfig, setup: Setup) -> dict[str, int]:
    # An op hides its workspace; what it returns is counted apart.
    gradients = setup.number_bytes * config.hidden_size * setup.tokens_per_pack + bytes_of_head(config, setup)
    if config.head == "score":
        begin = begin_of_backward(live)
        norm = position(live, "chimed.rms_norm_bwd.default")
        final_norm = max(at for at in range(begin) if live.log[at][0] == "chimed.rms_norm.default")
        return {
            "loss": max(total for _, total in live.log[final_norm:begin]),
            "backward of the head": max(total for _, total in live.log[begin:norm]),
        }
    if setup.loss == "logprob":
        results = 5 * FP32 * setup.tokens_per_pack
        return {
            "loss": live.log[position(live, "chimed.linear_logprob.default")][1] - results,
            "backward of the head": live.log[position(live, "chimed.linear_logprob_bwd.default")][1] - gradients,
        }
    loss = position(live, "chimed.linear_cross_entropy.default")
    scaled = max(total for name, total in live.log[loss + 1 :] if name == "chimed.scaled.default")
    return {"loss": live.log[loss][1] - gradients, "backward of the head": scaled}


def bytes_of_head(config: ModelConfig, setup: Setup) -> int:
    """Of the gradient of its matrix, where that is trained."""
    is_trained = setup.lora is None or {"lm_head", "embed_tokens"} & {*setup.lora.trained}
    return setup.number_bytes * config.vocab_size * config.hidden_size if is_trained else 0


def hidden_by_ops(config: ModelConfig, setup: Setup, moment: Moment) -> int:
    """What a moment's op takes that a log of ops does not show."""
    if config.head == "score" or moment.name not in ("loss", "backward of the head"):
        return 0
    if moment.name == "loss":
        return moment.head
    if setup.loss == "cross_entropy":
        return 0
    results = 5 * FP32 * setup.tokens_per_pack
    return moment.head - results + bytes_of_head(config, setup)


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
    "one process, tied, accumulation": (TIED_QWEN3, Setup(512, 256, micro_batches=2)),
    "one process, many words": (MANY_WORDS, Setup(256, 256)),
    "one process, many words, score": (replace(MANY_WORDS, head="score"), Setup(256, 256)),
    "one process, log-probabilities": (SMALL, Setup(512, 256, loss="logprob")),
    "fp32 on 4 processes": (SMALL, Setup(256, 256, world=4, precision="fp32")),
    "more processes than rows": (SMALL, Setup(256, 256, world=256)),
    "1b": (PRESETS["1b"], Setup(16384, 4096, world=8)),
    "7b": (PRESETS["7b"], Setup(4096, 4096, recompute="selective", micro_batches=2)),
    "log-probabilities": (SMALL, Setup(512, 256, world=8, loss="logprob")),
    "log-probabilities, tied, accumulation": (TIED_QWEN3, Setup(512, 256, world=4, micro_batches=2, loss="logprob")),
    "log-probabilities, 1b": (PRESETS["1b"], Setup(16384, 4096, world=8, recompute="full", loss="logprob")),
    "score": (SCORE, Setup(512, 256, world=8)),
    "adapters": (SMALL, Setup(512, 256, world=8, lora=LORA)),
    "adapters, selective": (SMALL, Setup(512, 256, world=2, recompute="selective", lora=LORA)),
    "adapters, full": (BIASED_QWEN2, Setup(512, 256, world=4, recompute="full", micro_batches=2, lora=LORA)),
    "adapters, one process": (SMALL, Setup(512, 256, lora=LORA, micro_batches=2)),
    "adapters, fp32, replicas": (TIED_QWEN3, Setup(512, 256, world=4, replicas=2, precision="fp32", lora=LORA)),
    "adapters of queries and values": (
        SMALL,
        Setup(512, 256, world=2, lora=QUERIES_VALUES),
    ),
    "adapters of outputs": (SMALL, Setup(512, 256, lora=OUTPUTS)),
    "adapters with dropout": (SMALL, Setup(512, 256, world=2, lora=replace(LORA, dropout=0.1))),
    "adapters with dropout, selective": (
        TIED_QWEN3,
        Setup(512, 256, world=2, recompute="selective", lora=replace(LORA, dropout=0.1)),
    ),
    "adapters of outputs, selective": (SMALL, Setup(512, 256, recompute="selective", lora=OUTPUTS)),
    "adapters of outputs with dropout": (SMALL, Setup(512, 256, lora=replace(OUTPUTS, dropout=0.1))),
    "adapters of outputs with dropout, selective": (
        SMALL,
        Setup(512, 256, recompute="selective", lora=replace(OUTPUTS, dropout=0.1)),
    ),
    "adapters and embeddings, selective": (SMALL, Setup(512, 256, world=4, recompute="selective", lora=WORDS)),
    "adapters and embeddings": (
        SMALL,
        Setup(512, 256, world=4, lora=WORDS),
    ),
    "adapters and tied embeddings": (
        TIED_QWEN3,
        Setup(512, 256, world=4, lora=WORDS),
    ),
    "adapters, log-probabilities": (SMALL, Setup(512, 256, world=2, loss="logprob", lora=LORA)),
    "adapters, score": (SCORE, Setup(512, 256, world=2, micro_batches=2, lora=replace(LORA, trained=("score",)))),
    "adapters, 7b": (PRESETS["7b"], Setup(4096, 4096, recompute="selective", micro_batches=2, lora=LORA)),
    "score, replicas": (SCORE, Setup(512, 256, world=8, replicas=2, micro_batches=2, recompute="selective")),
    "score, tied": (replace(TIED_QWEN3, head="score"), Setup(512, 256, world=4, micro_batches=3)),
    "score, 1b": (replace(PRESETS["1b"], head="score"), Setup(16384, 4096, world=8)),
}


@pytest.mark.parametrize("name", STEPS)
def test_plan_holds_what_a_step_holds(name: str) -> None:
    config, setup = STEPS[name]
    planned, counted = plan(config, setup), run_step(config, setup)
    rest = planned.at_rest
    assert (rest.weights, rest.gradients, rest.optimizer) == (counted.weights, counted.gradients, counted.optimizer)
    moments = {moment.name: moment for moment in planned.moments}
    for name_of_moment, total in counted.moments.items():
        moment = moments[name_of_moment]
        expected = without_optimizer(moment) - hidden_by_ops(config, setup, moment)
        assert expected == pytest.approx(total, rel=SLACK), name_of_moment
    # Nowhere in the backward pass is there more than at the moments that the plan looks at.
    backward = max(without_optimizer(at) - hidden_by_ops(config, setup, at) for at in planned.moments[1:-1])
    assert backward == pytest.approx(counted.backward_peak, rel=0.01)


@pytest.mark.parametrize("lora", [None, LORA, QUERIES_VALUES], ids=["all weights", "adapters", "fewer adapters"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_plan_holds_what_one_process_in_fp32_holds(
    recompute: Recompute, micro_batches: int, lora: LoraSpec | None
) -> None:
    """Without FSDP, on real tensors."""
    setup = Setup(512, 256, precision="fp32", recompute=recompute, micro_batches=micro_batches, device="cpu", lora=lora)
    planned, counted = plan(SMALL, setup), run_step(SMALL, setup, fake=False)
    rest = planned.at_rest
    assert (rest.weights, rest.gradients, rest.optimizer) == (counted.weights, counted.gradients, counted.optimizer)
    moments = {moment.name: moment for moment in planned.moments}
    for name_of_moment, total in counted.moments.items():
        moment = moments[name_of_moment]
        expected = without_optimizer(moment) - hidden_by_ops(SMALL, setup, moment)
        assert expected == pytest.approx(total, rel=SLACK), name_of_moment


READERS = {
    "words": (SMALL, Setup(512, 256, world=8)),
    "words, tied": (TIED_QWEN3, Setup(512, 256, world=8)),
    "words, narrow products": (replace(SMALL, intermediate_size=64), Setup(512, 256, world=4)),
    "words, one process": (SMALL, Setup(512, 256)),
    "words, one process in fp32": (SMALL, Setup(512, 256, precision="fp32")),
    "words, adapters": (SMALL, Setup(512, 256, world=8, lora=LORA)),
    "words, left gathered": (SMALL, Setup(512, 256, world=4, reshard_after_forward=False)),
    "score": (SCORE, Setup(512, 256, world=8)),
    "7b": (PRESETS["7b"], Setup(8192, 4096, world=8)),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_plan_holds_what_a_forward_pass_that_keeps_nothing_holds(name: str, frozen: bool) -> None:
    config, setup = READERS[name]
    setup = replace(setup, loss="logprob")
    if frozen:  # as `rlhf.roles` makes it
        setup = replace(setup, reshard_after_forward=True)
    with sharded(config, setup, frozen=frozen) as (model, pack, live), torch.no_grad():
        assert storage_bytes(weights_of(model)) == stored_bytes(config, setup, frozen)
        live.log.clear()
        asked = {"with_entropy": True} if config.head == "lm" else {}
        model(pack, **asked)
        final_norm = max(at for at, (op, _) in enumerate(live.log) if op == "chimed.rms_norm.default")
        in_blocks = max(total for _, total in live.log[:final_norm])
        at_head = max(total for _, total in live.log[final_norm + 1 :])
    block, head = reading(config, setup, frozen)
    assert in_blocks == pytest.approx(without_optimizer(block), rel=SLACK)
    returned = 5 * FP32 * setup.tokens_per_pack if config.head == "lm" else head.head
    assert at_head == pytest.approx(without_optimizer(head) - head.head + returned, rel=SLACK)


Face = Callable[..., Any]


def held_by_head(face: Face, config: ModelConfig, setup: Setup, *more: Any, given: int = 0) -> int:
    """Bytes at the peak of a face of an op, beside its arguments; `given`: numbers a token it takes first."""
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    with torch.device("meta"), LiveBytes() as live:
        hidden = torch.empty(setup.tokens_per_pack, config.hidden_size, dtype=dtype)
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        targets = torch.empty(setup.tokens_per_pack, dtype=torch.int64)
        numbers = [torch.empty(setup.tokens_per_pack) for _ in range(given)]
        arguments = live.total()
        face(*numbers[:3], hidden, weight, targets, None, *numbers[3:], *more)
    return live.peak() - arguments


def held_by_faces(config: ModelConfig, setup: Setup, faces: tuple[Face, Face, Face], is_frozen: bool) -> list[int]:
    """Of the cross-entropy, of the log-probabilities and of their backward."""
    cross_entropy, logprob, logprob_bwd = faces
    return [
        held_by_head(cross_entropy, config, setup, 0.0, True, not is_frozen),
        held_by_head(logprob, config, setup, True),
        held_by_head(logprob_bwd, config, setup, not is_frozen, given=6),
    ]


def planned_for_faces(config: ModelConfig, setup: Setup, is_frozen: bool) -> list[int]:
    sizes = setup.tokens_per_pack, setup.number_bytes, setup.device
    logprob = head_cost(config, "logprob", *sizes, is_frozen)
    arguments = 5 * FP32 * setup.tokens_per_pack
    return [
        head_cost(config, "cross_entropy", *sizes, is_frozen).forward,
        logprob.forward,
        logprob.backward + logprob.gradient - arguments,
    ]


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
@pytest.mark.parametrize("is_frozen", [False, True])
def test_plan_holds_what_the_head_holds(preset: str, tokens: int, precision: Precision, is_frozen: bool) -> None:
    config, setup = PRESETS[preset], Setup(tokens, tokens, precision=precision)
    faces = (
        linear_cross_entropy._linear_cross_entropy_triton,
        linear_logprob._linear_logprob_fwd_triton,
        linear_logprob._linear_logprob_bwd_triton,
    )
    with observed_launches(lambda *_: None, Chip(90, 132)):
        counted = held_by_faces(config, setup, faces, is_frozen)
    assert planned_for_faces(config, setup, is_frozen) == pytest.approx(counted, rel=SLACK)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [256, 4096])
def test_plan_holds_what_the_head_holds_on_a_cpu(
    tokens: int, precision: Precision, is_frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vocabulary.WORKSPACE, "meta", vocabulary.WORKSPACE["cpu"])
    config, setup = PRESETS["1b"], Setup(tokens, tokens, precision=precision, device="cpu")
    faces = (
        linear_cross_entropy._linear_cross_entropy,
        linear_logprob._linear_logprob_fwd,
        linear_logprob._linear_logprob_bwd,
    )
    counted = held_by_faces(config, setup, faces, is_frozen)
    assert planned_for_faces(config, setup, is_frozen) == pytest.approx(counted, rel=SLACK)


def test_a_frozen_base_is_loaded_in_less_memory_than_its_steps_take() -> None:
    """What fits when it trains must not run out of memory before, also where words are most of the model."""
    config = replace(BIASED_QWEN2, vocab_size=152064, hidden_size=3584, intermediate_size=18944)
    setup = Setup(4096, 4096, recompute="full", lora=LORA)
    with sharded(config, setup) as (model, _, live):
        live.log.clear()
        fill(model, ((name, like.to(torch.bfloat16)) for name, like in model.named_parameters()))
        matrix = config.vocab_size * config.hidden_size * setup.number_bytes  # of the file, which the host holds
        assert live.peak() - matrix <= plan(config, setup).peak.total
