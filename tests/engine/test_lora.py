"""Adapters in training: what is stored how, what learns and what does not, on any number of ranks."""

from __future__ import annotations

import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.building import publisher
from engine.guard import Guard, GuardConfig
from engine.job import count_parameters
from engine.lora import FrozenBase, LoraConfig, adapter_rate, stand_on
from engine.masters import master
from engine.memory import Setup, plan
from engine.mesh import ParallelConfig, start
from engine.optim import AdamW, OptimConfig
from engine.publish import require_model
from engine.shard import fill, parallelize
from engine.step import next_token_loss, train_step
from model.config import PRESETS, ModelConfig, parameter_shapes
from model.errors import InputError
from model.fingerprint import fingerprint_weights
from model.heads import CausalLM, ScalarModel
from model.hf import load_config
from model.init import initial_value
from model.lora import LoraSpec, add_lora, lora_shapes
from model.tokenizer import Tokenizer
from tests.engine.test_step import LENGTHS, assert_same, pack, small_config
from tests.model.tiny import LLAMA, batch, causal_lm
from tests.ranks import run_ranks
from tests.small_adapter import write_small_adapter
from tests.small_base import write_small_base

SPEC = LoraSpec(rank=3, alpha=6.0)
WORDS = replace(SPEC, trained=("embed_tokens", "lm_head"))
STEPS = 4


def full(tensor: torch.Tensor) -> np.ndarray:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().float().numpy().copy()


def first_values(config: ModelConfig, spec: LoraSpec) -> Any:
    shapes = parameter_shapes(config) | lora_shapes(config, spec)
    return ((name, initial_value(config, name, shape, 0)) for name, shape in shapes.items())


def train(
    spec: LoraSpec,
    replicas: int,
    precision: str,
    recompute: str = "none",
    compile_blocks: bool = False,
    tied: bool = False,
) -> dict[str, Any]:
    """A few steps over four packs a step, shared out over however many ranks there are."""
    runtime = start(ParallelConfig(replicas=replicas))
    config = small_config(tied=tied)
    with torch.device("meta"):
        model = CausalLM(config)
    add_lora(model, spec)
    parallelize(model, runtime, ParallelConfig(replicas=replicas), precision, recompute, compile_blocks)  # type: ignore[arg-type]
    fill(model, first_values(config, spec))
    optimizer = AdamW(model, OptimConfig(lr=0.01, clip=0.1))
    guard = Guard(GuardConfig(), runtime.device)
    named = dict(model.named_parameters())
    before = {name: full(parameter) for name, parameter in named.items() if name not in optimizer.parameters}
    reports, gradients = [], {}
    update = optimizer.step

    def keep_gradients(*scalars: torch.Tensor) -> None:
        gradients.update({name: full(optimizer.gradient(name)) for name in optimizer.parameters})
        assert all(parameter.grad is None for name, parameter in named.items() if name not in optimizer.parameters)
        update(*scalars)

    for step in range(STEPS):
        packs = [replace(pack(lengths, 10 * step + index), index=index) for index, lengths in enumerate(LENGTHS)]
        mine = packs[runtime.rank :: runtime.world]
        optimizer.step = keep_gradients  # type: ignore[method-assign]
        reports.append(train_step(model, optimizer, guard, next_token_loss(), mine, runtime, lr=0.01).read())
    return {
        "loss": np.array([report.loss for report in reports]),
        "norm": np.array([report.grad_norm for report in reports]),
        "targets": np.array([report.targets for report in reports]),
        "gradients": gradients,
        "weights": {name: full(optimizer.parameters[name]) for name in optimizer.parameters},
        "frozen": before,
        "frozen afterwards": {name: full(named[name]) for name in before},
        "dtypes": {name: str(master(parameter).dtype) for name, parameter in named.items()},
        "moments": set(dict(optimizer.state())),
    }


@pytest.mark.parametrize("spec", [SPEC, WORDS, replace(SPEC, dropout=0.3)], ids=["adapters", "words too", "dropout"])
def test_several_processes_equal_one(spec: LoraSpec) -> None:
    (one,) = run_ranks(train, 1, spec, 1, "fp32")
    assert (one["norm"] > 0.1).any(), "the clip must bite for its norm to be tested"
    many = run_ranks(train, 2, spec, 1, "fp32")
    assert_same(one, many[0], 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_words_that_are_one_matrix_are_trained_once_by_embedding_and_head(precision: str) -> None:
    (one,) = run_ranks(train, 1, WORDS, 1, precision, "none", False, True)
    assert set(one["weights"]) == {*lora_shapes(small_config(tied=True), SPEC), "model.embed_tokens.weight"}
    assert one["dtypes"]["model.embed_tokens.weight"] == "torch.float32"
    if precision == "fp32":
        assert_same(one, run_ranks(train, 2, WORDS, 1, precision, "none", False, True)[0], 1e-5)


def test_ranks_that_hold_nothing_of_a_thin_adapter_train_with_the_others() -> None:
    spec = LoraSpec(1, 2.0, targets=("o_proj", "down_proj"))
    (one,) = run_ranks(train, 1, spec, 1, "fp32")
    assert_same(one, run_ranks(train, 4, spec, 1, "fp32")[0], 1e-5)


def test_sharded_replicas_equal_one_process() -> None:
    (one,) = run_ranks(train, 1, SPEC, 1, "fp32")
    assert_same(one, run_ranks(train, 4, SPEC, 2, "fp32")[0], 1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(recompute: str) -> None:
    spec = replace(SPEC, dropout=0.3)
    (kept,) = run_ranks(train, 1, spec, 1, "fp32")
    (recomputed,) = run_ranks(train, 1, spec, 1, "fp32", recompute)
    assert_same(kept, recomputed, 0.0)


def train_compiled(spec: LoraSpec) -> dict[str, Any]:
    torch._dynamo.reset()
    return train(spec, 1, "fp32", compile_blocks=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_train_as_plain_ones() -> None:
    spec = replace(SPEC, dropout=0.3)
    (plain,) = run_ranks(train, 1, spec, 1, "fp32")
    (compiled,) = run_ranks(train_compiled, 1, spec)
    assert_same(plain, compiled, 1e-5)


@pytest.mark.parametrize(("world", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16")])
def test_frozen_weights_are_stored_as_they_compute_and_stay_bitwise_what_they_were(world: int, precision: str) -> None:
    for rank in run_ranks(train, world, SPEC, 1, precision):
        adapters = set(lora_shapes(small_config(tied=False), SPEC))
        assert rank["weights"].keys() == adapters and rank["frozen"].keys() == set(rank["dtypes"]) - adapters
        for name, dtype in rank["dtypes"].items():
            expected = "torch.float32" if name in adapters or precision == "fp32" else "torch.bfloat16"
            assert dtype == expected, name
        for name, value in rank["frozen"].items():
            assert np.array_equal(value, rank["frozen afterwards"][name]), name
        assert any(value.any() for name, value in rank["weights"].items() if name.endswith("lora_b"))
        named = {f"optimizer.{kind}.{name}" for name in adapters for kind in ("exp_avg", "exp_avg_sq")}
        assert rank["moments"] == named | {"optimizer.updates"}


def test_bf16_follows_fp32() -> None:
    (exact,) = run_ranks(train, 1, SPEC, 1, "fp32")
    half = run_ranks(train, 2, SPEC, 1, "bf16")[0]
    # bf16 carries 8 bits: a relative rounding of 2^-9 a number.
    np.testing.assert_allclose(half["loss"], exact["loss"], rtol=2**-7)


def test_the_gradient_norm_is_that_of_what_is_trained() -> None:
    (one,) = run_ranks(train, 1, SPEC, 1, "fp32")
    # Gradients are of sums over the step's capacity of tokens; the norm is of the mean over targets.
    capacity = sum(pack(lengths, 0).tokens.numel() for lengths in LENGTHS)
    squared = sum(float((gradient.astype(np.float64) ** 2).sum()) for gradient in one["gradients"].values())
    assert one["norm"][-1] == pytest.approx(squared**0.5 * capacity / one["targets"][-1], rel=1e-5)


def score_dtypes() -> dict[str, str]:
    runtime = start(ParallelConfig())
    config = replace(small_config(tied=True), head="score")
    with torch.device("meta"):
        learning, judging = ScalarModel(config), ScalarModel(config)
    add_lora(learning, LoraConfig(rank=2).spec())  # type: ignore[arg-type]
    judging.requires_grad_(False)
    for model in (learning, judging):
        parallelize(model, runtime, ParallelConfig(), "bf16", "none")
    assert learning.score.weight.requires_grad
    return {
        "learning": str(learning.score.weight.dtype),
        "judging": str(judging.score.weight.dtype),
        "trunk": str(judging.model.norm.weight.dtype),
    }


def test_the_head_of_one_number_is_fp32_trained_or_not() -> None:
    (found,) = run_ranks(score_dtypes, 1)
    assert found == {"learning": "torch.float32", "judging": "torch.float32", "trunk": "torch.bfloat16"}


def overfit(model: nn.Module, lr: float, steps: int = 120) -> float:
    """Loss a token after some steps on one batch."""
    optimizer = AdamW(model, OptimConfig(weight_decay=0.0))
    one, none = torch.ones(()), torch.zeros(())
    of = batch([20, 11])
    for _ in range(steps):
        loss = next_token_loss()(model, of)
        (loss.total / loss.count).backward()
        optimizer.step(torch.tensor(lr), one, none)
        optimizer.zero_grad()
    return float(loss.reported / loss.count)


# A head that is never trained needs weights that can tell words apart.
WIDE = replace(LLAMA, initializer_range=0.3)


def fitted(spec: LoraSpec | None, lr: float) -> float:
    model = causal_lm(WIDE)
    if spec is not None:
        add_lora(model, spec)
        fill(model, first_values(WIDE, spec))
    return overfit(model, lr)


def test_a_rank_of_full_width_fits_what_full_training_fits() -> None:
    """Random tokens, which can only be learnt by heart. Adapters of rank 1 on queries alone have no room for them."""
    rank = WIDE.hidden_size
    assert fitted(None, 3e-3) < 0.05
    assert fitted(LoraSpec(rank, 2.0 * rank), 3e-3) < 0.05
    assert fitted(LoraSpec(1, 2.0, targets=("q_proj",)), 3e-3) > 1.0


def test_13b_with_adapters_of_rank_16_fits_one_80_gb_card_and_all_of_it_does_not() -> None:
    setup = Setup(4096, 4096, lora=LoraConfig(rank=16).spec(), micro_batches=16)
    card = int(79.1 * 2**30)
    planned = plan(PRESETS["ziya2-13b"], setup)
    assert planned.fits(card) and not plan(PRESETS["ziya2-13b"], replace(setup, lora=None)).fits(card)
    parameters = PRESETS["ziya2-13b"].num_parameters
    assert setup.lora is not None
    adapters = sum(math.prod(shape) for shape in lora_shapes(PRESETS["ziya2-13b"], setup.lora).values())
    assert planned.frozen == 2 * parameters
    assert planned.at_rest.optimizer == 8 * adapters and planned.at_rest.gradients == 4 * adapters


def test_every_option_of_adapters_belongs_to_the_run() -> None:
    usual = LoraConfig(rank=4)
    others: dict[str, Any] = {
        "rank": 5,
        "alpha": 9.0,
        "dropout": 0.1,
        "rslora": True,
        "targets": ["q_proj"],
        "train_embeddings": True,
    }
    assert others.keys() == {option.name for option in fields(usual)}
    assert len({replace(usual, **{name: value}).describe() for name, value in others.items()} | {usual.describe()}) == 7
    in_order, backwards = (replace(usual, targets=targets) for targets in (["q_proj", "o_proj"], ["o_proj", "q_proj"]))
    assert in_order.describe() == backwards.describe()
    assert usual.describe() == replace(usual, alpha=8.0).describe() and LoraConfig().describe() is None


def test_what_is_trained_is_counted_and_what_is_frozen_is_not_said_of_it() -> None:

    def told(spec: LoraSpec | None, **changed: Any) -> str:
        return count_parameters(replace(LLAMA, **changed), spec)

    adapters, words = (sum(map(math.prod, lora_shapes(LLAMA, SPEC).values())), 2 * LLAMA.vocab_size * LLAMA.hidden_size)
    total = f"{LLAMA.num_parameters:,} parameters"
    rank = "and adapters of rank 3"
    assert told(None) == total
    assert told(SPEC) == f"{total}, frozen, {rank}: {adapters:,} are trained"
    assert told(WORDS) == f"{total}, frozen but for embed_tokens and lm_head, {rank}: {adapters + words:,} are trained"
    assert "frozen but for embed_tokens, and" in told(WORDS, tie_word_embeddings=True)
    assert "frozen but for score, and" in told(replace(SPEC, trained=("score",)), head="score")


def test_a_run_never_takes_the_place_of_what_its_adapters_stand_on(tmp_path: Path) -> None:
    """Of a part of it: `best` is written anew while the run goes on, and set aside by --resume never."""
    base = write_small_base(tmp_path / "base")
    best = write_small_adapter(tmp_path / "run" / "best", base)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for out in ("run", "link"):
        with pytest.raises(InputError, match=rf"{out} holds a model that the adapters stand on"):
            stand_on(best, "best", str(tmp_path / out))
    found = stand_on(best, "best", str(tmp_path / "run-2"))
    assert found == FrozenBase(str(best), fingerprint_weights(best))


def test_a_base_that_is_trained_on_meanwhile_is_not_taken_for_the_one_that_was_read(tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base")
    config = load_config(base)
    model = CausalLM(config)
    add_lora(model, SPEC)
    fill(model, first_values(config, SPEC))
    publish = publisher(model, config, Tokenizer.load(base), "sft", torch.float32, SPEC, base)
    publish(tmp_path / "before", 1)
    path = base / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    publish(tmp_path / "after", 2)
    for run in ("before", "after"):
        with pytest.raises(InputError, match="are not those that this adapter was trained on"):
            require_model(tmp_path / run)


def test_rank_alone_says_everything() -> None:
    assert LoraConfig().spec() is None
    spec = LoraConfig(rank=16).spec()
    assert spec is not None and spec.scale == 2 and len(spec.targets) == 7 and spec.dropout == 0
    assert LoraConfig(rank=16, rslora=True).spec().scale == 8  # type: ignore[union-attr]
    assert adapter_rate(PRESETS["7b"], LoraConfig(rank=16)) == 3e-4
