"""What a plan advises is planned anew; what the page says about plans is what the code says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.memory import Setup, plan
from engine.memory_advice import GIB, advice, describe
from engine.recompute import Recompute
from model.config import PRESETS, ModelConfig

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


@pytest.mark.parametrize(
    ("tokens", "cheapest", "next_one"), [(32768, "micro_batch_tokens", "recompute"), (8192, "recompute", "micro_batch")]
)
def test_on_one_gpu_the_shortest_step_comes_first(tokens: int, cheapest: str, next_one: str) -> None:
    """Of 7b, 32,768 tokens a step: recomputing selectively costs 21.6 ms, a micro-batch more 11.2 ms."""
    setup = Setup(tokens, 4096, micro_batches=32768 // tokens)
    smaller = replace(setup, tokens_per_pack=tokens // 2, micro_batches=65536 // tokens)
    ways = [plan(PRESETS["7b"], way) for way in (replace(setup, recompute="selective"), smaller)]
    room = max(way.needed_bytes for way in ways)
    memory = plan(PRESETS["7b"], setup)
    assert not memory.fits(room)
    first, second, *_ = advice(memory, room)
    assert first.options.startswith(f"--train.{cheapest}") and second.options.startswith(f"--train.{next_one}")


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
