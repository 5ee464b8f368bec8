"""Masters in halves: one process in bf16 trains what fp32 masters beside bf16 copies would train, to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from engine.building import publisher
from engine.checkpoint import Checkpointer
from engine.guard import Guard, GuardConfig
from engine.masters import Master, master, masters
from engine.mesh import ParallelConfig, start, stop
from engine.optim import AdamW, OptimConfig
from engine.publish import gather_full
from engine.shard import fill, parallelize
from engine.step import next_token_loss, train_step
from kernels.adamw import adamw
from kernels.masters import split_master
from model.config import parameter_shapes
from model.heads import CausalLM, ScalarModel
from model.hf import load_config
from model.init import initial_value
from model.lora import LoraSpec, add_lora, lora_shapes
from model.peft import read_adapter
from model.tokenizer import Tokenizer
from tests.engine.test_step import LENGTHS, pack, small_config
from tests.ranks import run_ranks
from tests.small_base import write_small_base

RATE = 1e-2

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    stop()


def packs_of(step: int) -> list[Any]:
    return [pack(lengths, 10 * step + index) for index, lengths in enumerate(LENGTHS)]


class Run:
    """A model of one process or of several, and what trains it."""

    def __init__(self, root: type[nn.Module] = CausalLM, lora: LoraSpec | None = None, tied: bool = False) -> None:
        self.runtime = start(ParallelConfig())
        self.config = small_config(tied)
        shapes = parameter_shapes(self.config) | ({} if lora is None else lora_shapes(self.config, lora))
        with torch.device("meta"):
            self.model = root(self.config)
            if lora is not None:
                add_lora(self.model, lora)
        parallelize(self.model, self.runtime, ParallelConfig(), "bf16", "none")
        fill(self.model, ((name, initial_value(self.config, name, shape, 0)) for name, shape in shapes.items()))
        self.optimizer = AdamW(self.model, OptimConfig(clip=0.5))
        self.guard = Guard(GuardConfig(), self.runtime.device)

    def step(self, number: int, rate: float = RATE) -> None:
        mine = packs_of(number)[self.runtime.rank :: self.runtime.world]
        train_step(self.model, self.optimizer, self.guard, next_token_loss(), mine, self.runtime, lr=rate)

    def tensors(self) -> dict[str, Tensor | Master]:
        return {**dict(self.optimizer.masters()), **dict(self.optimizer.state())}

    def full(self) -> dict[str, Tensor]:
        """Masters, moments and the count of updates, in full."""
        return {name: tensor.clone() for name, tensor in gather_full(self.tensors().items(), everywhere=True)}


def arrays(tensors: dict[str, Tensor]) -> Arrays:
    """What one process may hand to another."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype == np.float32 and np.array_equal(found[name], array), name


@pytest.mark.parametrize("tied", [False, True])
def test_one_process_trains_what_fp32_masters_beside_copies_would(tied: bool) -> None:
    run = Run(tied=tied)
    assert not isinstance(run.model, FSDPModule)
    by_hand = CausalLM(run.config).bfloat16()
    weights = {name: one.join() for name, one in masters(run.model.named_parameters()) if isinstance(one, Master)}
    assert weights.keys() == dict(by_hand.named_parameters()).keys()
    moments = {name: (torch.zeros_like(one), torch.zeros_like(one)) for name, one in weights.items()}
    for number in range(4):
        for name, parameter in by_hand.named_parameters():
            parameter.data.copy_(split_master(weights[name])[0])
            parameter.grad, parameter.grad_dtype = None, torch.float32
        capacity = sum(batch.tokens.numel() for batch in packs_of(number))
        losses = [next_token_loss()(by_hand, batch) for batch in packs_of(number)]
        for loss in losses:
            (loss.total / capacity).backward()
        to_mean = capacity / sum(loss.count for loss in losses)
        gradients = [parameter.grad for parameter in by_hand.parameters()]
        norm = sum(gradient.double().square().sum() for gradient in gradients).sqrt() * to_mean
        adamw(
            list(weights.values()),
            gradients,
            [first for first, _ in moments.values()],
            [second for _, second in moments.values()],
            lr=torch.tensor(RATE),
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=[0.1 if one.ndim == 2 else 0.0 for one in weights.values()],
            step=torch.tensor(number + 1.0),
            clip_scale=(to_mean * (0.5 / norm).clamp(max=1.0)).float(),
            should_skip=torch.tensor(False),
        )
        run.step(number)
        found = run.full()
        assert_same(arrays({name: found[name] for name in weights}), arrays(weights))
        assert norm > 0.5, "the clip must bite for its norm to be tested"
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, split_master(weights[name])[0]), "products read the masters' upper halves"


def test_an_update_too_small_for_bf16_is_kept() -> None:
    run = Run()
    before, shown = run.full(), [parameter.detach().clone() for parameter in run.model.parameters()]
    run.step(0, rate=1e-7)
    unchanged = [torch.equal(old, new) for old, new in zip(shown, run.model.parameters(), strict=True)]
    assert sum(unchanged) > len(unchanged) / 2, "the rate must be too small for most weights in bf16"
    after = run.full()
    assert not any(torch.equal(after[name], before[name]) for name in run.optimizer.parameters)


def test_what_is_frozen_or_fp32_has_no_second_half() -> None:
    lora = LoraSpec(rank=2, alpha=4.0)
    model = Run(lora=lora).model
    for name, parameter in model.named_parameters():
        assert isinstance(master(parameter), Master) == (".lora_" in name) == parameter.requires_grad
        assert parameter.dtype == torch.bfloat16
    with torch.device("meta"):
        scorer = ScalarModel(dataclasses.replace(small_config(False), head="score"))
    parallelize(scorer, start(ParallelConfig()), ParallelConfig(), "bf16", "none")
    kinds = {name: type(one) for name, one in masters(scorer.named_parameters())}
    assert kinds.pop("score.weight") is Tensor and set(kinds.values()) == {Master}
    assert scorer.score.weight.dtype == torch.float32


def test_a_step_moves_masters_in_halves_and_whole_ones() -> None:
    config = dataclasses.replace(small_config(False), head="score")
    with torch.device("meta"):
        model = ScalarModel(config)
    parallelize(model, start(ParallelConfig()), ParallelConfig(), "bf16", "none")
    shapes = parameter_shapes(config)
    fill(model, ((name, initial_value(config, name, shape, 0)) for name, shape in shapes.items()))
    optimizer = AdamW(model, OptimConfig())
    before = {name: tensor.clone() for name, tensor in gather_full(optimizer.masters(), everywhere=True)}
    model(pack([16], 0)).square().sum().backward()
    optimizer.step(torch.tensor(RATE), torch.tensor(1.0), torch.tensor(0.0))
    assert optimizer.updates == 1
    for name, tensor in gather_full(optimizer.masters(), everywhere=True):
        assert not torch.equal(tensor, before[name]), name


def test_full_weights_are_masters_or_what_products_read() -> None:
    run = Run()
    run.step(0)
    named = list(masters(run.model.named_parameters()))
    halves = {name: one for name, one in named if isinstance(one, Master)}
    for dtype in (None, torch.float32):
        for name, full in gather_full(named, dtype):
            assert full.dtype == torch.float32 and torch.equal(full, halves[name].join())
    halves["model.norm.weight"].copy_(torch.full((run.config.hidden_size,), 1 + 2**-8))  # between two in bf16
    for name, full in gather_full(named, torch.bfloat16):
        assert torch.equal(full, halves[name].weight)


def test_adapters_are_published_as_masters(tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base")
    config, spec = load_config(base), LoraSpec(rank=2, alpha=4.0)
    with torch.device("meta"):
        model = CausalLM(config)
    add_lora(model, spec)
    parallelize(model, start(ParallelConfig()), ParallelConfig(), "bf16", "none")
    shapes = parameter_shapes(config) | lora_shapes(config, spec)
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    fill(model, values.items())
    publisher(model, config, Tokenizer.load(base), "sft", torch.bfloat16, spec, base)(tmp_path / "run", 1)
    published = dict(read_adapter(tmp_path / "run", config))
    assert published.keys() == lora_shapes(config, spec).keys()
    for name, tensor in published.items():
        assert torch.equal(tensor, values[name]), name


def train_and_save(directory: Path, first: int, last: int, asynchronous: bool = False) -> Arrays:
    """Steps from the newest checkpoint on, and a checkpoint."""
    run = Run()
    checkpointer = Checkpointer(directory, asynchronous=asynchronous)
    if first:
        assert checkpointer.load(first, run.tensors()) == {"at": first}
    for number in range(first, last):
        run.step(number)
    checkpointer.save(last, run.tensors(), {"at": last})
    checkpointer.wait()
    return arrays(run.full())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_was_broken_off_ends_as_an_unbroken_one(asynchronous: bool, tmp_path: Path) -> None:
    whole = train_and_save(tmp_path / "whole", 0, 4)
    half = train_and_save(tmp_path / "broken", 0, 2, asynchronous)
    assert not np.array_equal(half["lm_head.weight"], whole["lm_head.weight"])
    assert_same(train_and_save(tmp_path / "broken", 2, 4), whole)


def load(directory: Path, step: int) -> Arrays:
    run = Run()
    Checkpointer(directory).load(step, run.tensors())
    return arrays(run.full())


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 2), (2, 1)])
def test_a_run_may_go_on_with_another_number_of_processes(saved_by: int, loaded_by: int, tmp_path: Path) -> None:
    saved = run_ranks(train_and_save, saved_by, tmp_path, 0, 1)[0]
    head = torch.from_numpy(saved["lm_head.weight"])
    assert not torch.equal(head, head.bfloat16().float())
    for found in run_ranks(load, loaded_by, tmp_path, 1):
        assert_same(found, saved)


def test_gradients_are_sums_in_fp32() -> None:
    run = Run()
    for batch in packs_of(0):
        next_token_loss()(run.model, batch).total.backward()
    for name, gradient in ((name, run.optimizer.gradient(name)) for name in run.optimizer.parameters):
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float()), name
