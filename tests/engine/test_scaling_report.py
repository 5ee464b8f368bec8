"""What is said of clusters: each row is the models' own figures, and the advice follows from the rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.memory import Setup, plan
from engine.scaling import Cluster, StepTime, step_time
from engine.scaling_report import MEMORY, Row, compare, longest_pack, report, verdict
from model.config import PRESETS

MODEL = PRESETS["160m"]
STEP = Setup(2048, 2048, recompute="selective")
CLUSTER = Cluster("A100", 200e9, 0.5)


def test_every_count_is_sharded_over_all_and_over_each_node() -> None:
    rows = compare(MODEL, STEP, [8, 32], CLUSTER)
    assert [(row.setup.world, row.setup.replicas) for row in rows] == [(8, 1), (32, 1), (32, 4)]
    for row in rows:
        assert row.time == step_time(MODEL, row.setup, CLUSTER)
        assert row.needed == plan(MODEL, row.setup).needed_bytes


def test_within_a_node_nothing_goes_to_others_and_of_copies_the_gradients_alone() -> None:
    """4 bytes a parameter of an eighth of the gradients, sent and received back by all but one part of four."""
    one, over_all, copies = compare(MODEL, STEP, [8, 32], CLUSTER)
    assert one.between_nodes == 0
    assert copies.between_nodes == pytest.approx(2 * 3 / 4 * 4 * MODEL.num_parameters / 8, rel=1e-3)
    # Sharded over all, a micro-batch moves two gathers in bf16, the root's once, and gradients in fp32: 8 bytes.
    root = 2 * MODEL.vocab_size * MODEL.hidden_size
    assert over_all.between_nodes == pytest.approx(31 / 32 * (8 * MODEL.num_parameters - 2 * root) / 8, rel=1e-3)


def test_longest_pack_fits_and_one_grain_more_does_not() -> None:
    setup = replace(STEP, world=8)
    for memory in (8 << 30, MEMORY["A100"]):
        tokens = longest_pack(MODEL, setup, memory)

        def fits(length: int, memory: int = memory) -> bool:
            longer = replace(setup, tokens_per_pack=length, context=length)
            return plan(replace(MODEL, context=length), longer).fits(memory)

        assert tokens % 1024 == 0 and fits(tokens) and not fits(tokens + 1024)
    assert longest_pack(MODEL, setup, 1 << 30) == 0


def row(world: int, replicas: int, seconds: float, fits: bool = True) -> Row:
    setup = replace(STEP, world=world, replicas=replicas)
    return Row(setup, StepTime(seconds, 1.0, 1.0), 0, 0, 0, fits)


def pairs(*seconds: tuple[float, float], fits: bool = True) -> list[Row]:
    """Of FSDP and HSDP on 16, 32, ... GPUs."""
    return [
        each
        for power, (fsdp, hsdp) in enumerate(seconds, 1)
        for each in (row(8 << power, 1, fsdp), row(8 << power, 1 << power, hsdp, fits))
    ]


def test_the_switch_is_where_hsdp_begins_to_be_faster_for_good() -> None:
    assert verdict(pairs((1.0, 1.0), (1.005, 1.0), (1.1, 1.0), (1.5, 1.0))) == (
        "From 64 GPUs on HSDP is 1.10 to 1.50 times as fast: --parallel.replicas GPUs/8."
    )
    assert verdict(pairs((1.2, 1.0))).startswith("From 16 GPUs on HSDP is 1.20 times as fast:")
    assert verdict(pairs((1.2, 1.0), (1.3, 1.0), (0.9, 1.0))).startswith("On 16, 32 GPUs alone HSDP is 1.20 to 1.30")
    assert verdict(pairs((1.0, 1.2), (1.005, 1.0))).startswith("Nowhere")


def test_hsdp_that_does_not_fit_is_not_advised() -> None:
    assert verdict(pairs((2.0, 1.0), fits=False)) == (
        "A copy of the model does not fit a node: only FSDP over several does."
    )
    only_later = [row(16, 1, 2.0), row(16, 2, 1.0, fits=False), row(32, 1, 1.0), row(32, 4, 1.0)]
    assert verdict(only_later).startswith("Nowhere")
    assert verdict([row(8, 1, 1.0)]) == "On one node there is only FSDP."


def test_a_fixed_batch_leaves_fewer_micro_batches_to_each_of_more_gpus_until_there_are_none() -> None:
    text = report(MODEL, STEP, [8, 16, 32], CLUSTER, batch_tokens=16 * 2048)
    of_eight, of_sixteen = (
        compare(MODEL, replace(STEP, micro_batches=2), [8], CLUSTER) + compare(MODEL, STEP, [16], CLUSTER)[:1]
    )
    lines = text.splitlines()[4:]
    assert lines[0].split()[4] == f"{of_eight.time.computing * 1e3:,.0f}"
    assert lines[1].split()[4] == f"{of_sixteen.time.computing * 1e3:,.0f}"
    assert lines[3] == "   32  more GPUs than the 16 micro-batches of a step: give a larger batch"


def test_what_does_not_fit_is_said() -> None:
    long = replace(STEP, tokens_per_pack=1 << 20, context=1 << 20)
    text = report(replace(MODEL, context=1 << 20), long, [8], CLUSTER)
    assert text.splitlines()[4].endswith("  does not fit")
