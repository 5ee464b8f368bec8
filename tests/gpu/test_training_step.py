"""A training step on a GPU: it learns, it repeats itself bitwise, and it holds what the memory plan says."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from engine.fp8 import use_fp8
from engine.guard import Guard, GuardConfig
from engine.memory import Setup, plan
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.optim import AdamW, OptimConfig
from engine.recompute import Recompute
from engine.shard import Precision, fill, parallelize
from engine.step import next_token_loss, train_step
from kernels.fp8_linear import has_fp8
from model.batch import IGNORE, PackedBatch
from model.config import PRESETS, ModelConfig, parameter_shapes
from model.heads import CausalLM
from model.init import initial_value
from tests.kernels.faces import DEVICE

pytestmark = pytest.mark.gpu


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    gc.collect()
    torch.cuda.empty_cache()
    yield start(ParallelConfig())
    stop()


def random_pack(config: ModelConfig, tokens: int, context: int, seed: int) -> PackedBatch:
    """Documents of half a context, and a last one that ends where the pack does."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (tokens,), generator=generator)
    bounds = [*range(0, tokens, context // 2), tokens]
    starts = torch.tensor(bounds[:-1]).repeat_interleave(torch.tensor(bounds).diff())
    targets = ids.roll(-1)
    targets[torch.tensor(bounds[1:]) - 1] = IGNORE
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return PackedBatch(ids, torch.arange(tokens) - starts, cu_seqlens, targets, len(bounds) - 1, context)


def train(config: ModelConfig, setup: Setup, runtime: Runtime, steps: int) -> list[float]:
    """Steps on the same micro-batches, at the precision and recompute mode of the setup; the losses."""
    with torch.device("meta"):
        model = CausalLM(config)
    if setup.fp8:
        use_fp8(model, runtime.device)
    parallel = ParallelConfig(reshard_after_forward=setup.reshard_after_forward)
    parallelize(model, runtime, parallel, setup.precision, setup.recompute)
    shapes = parameter_shapes(config)
    fill(model, ((name, initial_value(config, name, shapes[name], 0, runtime.device)) for name in shapes))
    optimizer, guard = AdamW(model, OptimConfig()), Guard(GuardConfig(), runtime.device)
    packs = [random_pack(config, setup.tokens_per_pack, setup.context, seed) for seed in range(setup.micro_batches)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return [
        train_step(model, optimizer, guard, next_token_loss(), packs, runtime, lr=1e-3).read().loss
        for _ in range(steps)
    ]


has_8_bits = pytest.mark.skipif(not has_fp8(torch.device(DEVICE)), reason="needs a GPU with 8-bit products")


@pytest.mark.parametrize(
    ("precision", "fp8"), [("bf16", False), ("fp32", False), pytest.param("bf16", True, marks=has_8_bits)]
)
def test_loss_falls_and_repeats_bitwise(runtime: Runtime, precision: Precision, fp8: bool) -> None:
    config = PRESETS["tiny"]
    setup = Setup(1024, 256, precision=precision, fp8=fp8, micro_batches=2)
    losses = train(config, setup, runtime, 12)
    assert losses[-1] < losses[0] - 0.5
    assert train(config, setup, runtime, 12) == losses


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_loss(runtime: Runtime, recompute: Recompute) -> None:
    config = PRESETS["tiny"]
    kept = train(config, Setup(1024, 256), runtime, 4)
    computed_again = train(config, Setup(1024, 256, recompute=recompute), runtime, 4)
    assert computed_again == kept


@pytest.mark.parametrize(
    ("preset", "setup"),
    [
        ("1b", Setup(8192, 4096)),
        pytest.param("1b", Setup(8192, 4096, fp8=True), marks=has_8_bits),
        ("1b", Setup(16384, 4096, recompute="selective", micro_batches=2)),
        ("1b", Setup(8192, 4096, recompute="full")),
        ("7b", Setup(4096, 4096, recompute="selective")),
        ("7b", Setup(8192, 4096, recompute="full", micro_batches=2)),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{value.tokens_per_pack}-{value.recompute}{'-fp8' * value.fp8}"
    ),
)
def test_plan_holds_what_the_device_allocates(runtime: Runtime, preset: str, setup: Setup) -> None:
    config = PRESETS[preset].with_context(setup.context)
    planned = plan(config, setup)
    if not planned.fits(torch.cuda.get_device_properties(0).total_memory):
        pytest.skip(f"needs {planned.needed_bytes / 2**30:.0f} GiB of device memory")
    train(config, setup, runtime, 2)
    assert planned.peak.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.10)
