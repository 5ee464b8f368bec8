"""The time of a step: against sums that can be done by hand where they can, and bounds where they cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.communication import Collective, Compute, collectives, step_events
from engine.memory import Setup
from engine.metrics import PEAKS
from engine.scaling import Cluster, flops, sent_between_nodes, spread, step_time
from model.config import PRESETS

MODEL = PRESETS["1b"]
SETUP = Setup(4096, 4096, world=64, micro_batches=2)
FAST = Cluster("H100", 400e9, 0.5)
US = 1e-6


def whole(collective: Collective, ranks: int) -> Collective:
    return replace(collective, ranks=ranks)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_computes_is_the_models_flops_and_what_is_recomputed(recompute: str) -> None:
    setup = replace(SETUP, recompute=recompute, context=2048)
    total = sum(flops(MODEL, setup, event) for event in step_events(MODEL, setup) if isinstance(event, Compute))
    model = MODEL.flops_per_token(2048, causal=True)
    of_head = 6 * MODEL.vocab_size * MODEL.hidden_size
    expected = model if recompute == "none" else model + (model - of_head) / 3
    assert total == pytest.approx(expected * 2 * 4096, rel=1e-9)
    step = step_time(MODEL, setup, FAST)
    assert step.computing == pytest.approx(total / (0.5 * PEAKS["H100"]))


def test_a_window_bounds_what_attention_computes() -> None:
    config = replace(MODEL, model_type="mistral", sliding_window=512)
    assert flops(config, SETUP, Compute("block 0")) == flops(MODEL, replace(SETUP, context=512), Compute("block 0"))


def test_one_gpu_waits_for_nobody() -> None:
    step = step_time(MODEL, replace(SETUP, world=1), FAST)
    assert step.exposed == step.moving == 0.0


def test_groups_lie_on_nodes_as_torchrun_numbers_ranks() -> None:
    """On 4 nodes of 8."""
    shard = Collective("all_gather", "root", "shard", 32, 1)
    replicate = Collective("all_reduce", "root", "replicate", 2, 1)
    fsdp = Setup(4096, 4096, world=32)
    assert spread(shard, fsdp) == (4, 8)
    for replicas, shards_on, copies_on in ((2, (2, 8), (2, 1)), (4, (1, 8), (4, 1)), (16, (1, 2), (4, 4))):
        setup = replace(fsdp, replicas=replicas)
        assert spread(whole(shard, setup.shards), setup) == shards_on
        assert spread(whole(replicate, replicas), setup) == copies_on
    assert spread(replace(shard, group="world"), fsdp) == (4, 8)


def test_a_ring_takes_its_hops_and_the_bytes_over_its_slowest_link() -> None:
    gather = Collective("all_gather", "root", "shard", 8, 8 << 30)
    one_node = replace(SETUP, world=8)
    by_hand = 8.4 * US + 7 * 3.4 * US + 7 * 2**30 / (18 * 20.6e9)
    assert FAST.moved_in(gather, one_node) == pytest.approx(by_hand)
    # Eight nodes of eight: 63 hops, 7 of them between nodes; 64 parts of 128 MiB, 63 of which pass every link.
    slow = replace(FAST, network=100e9)
    by_hand = 8.4 * US + 56 * 3.4 * US + 7 * 14 * US + 63 * 2**27 / 100e9
    assert slow.moved_in(whole(gather, 64), SETUP) == pytest.approx(by_hand)
    # Copies on eight nodes: each of eight rings has an eighth of the network.
    hsdp = replace(SETUP, replicas=8)
    reduce = Collective("all_reduce", "root", "replicate", 8, 8 << 30)
    by_hand = 8.4 * US + 14 * 14 * US + 2 * 7 * 2**30 / (100e9 / 8)
    assert slow.moved_in(reduce, hsdp) == pytest.approx(by_hand)


def test_small_messages_take_the_protocol_of_short_hops() -> None:
    gather = Collective("all_gather", "root", "shard", 64, 1 << 20)
    sent = 63 * 2**14
    assert FAST.moved_in(gather, SETUP) == pytest.approx(14 * US + 56 * 1.9 * US + 7 * 4 * US + sent / (0.92 * 370.8e9))


def test_bytes_between_nodes_are_an_eighth_in_a_ring_of_whole_nodes_and_all_between_copies() -> None:
    gather = Collective("all_gather", "root", "shard", 64, 1 << 20)
    assert sent_between_nodes(gather, SETUP) == gather.sent / 8
    hsdp = replace(SETUP, replicas=8)
    assert sent_between_nodes(whole(gather, 8), hsdp) == 0
    reduce = Collective("all_reduce", "root", "replicate", 8, 1 << 20)
    assert sent_between_nodes(reduce, hsdp) == reduce.sent


def test_where_computing_takes_no_time_collectives_follow_one_another() -> None:
    step = step_time(MODEL, SETUP, replace(FAST, mfu=1e9))
    assert step.moving == pytest.approx(sum(FAST.moved_in(each, SETUP) for each in collectives(MODEL, SETUP)))
    assert step.total == pytest.approx(step.moving, rel=1e-6)


def test_where_links_are_faster_than_blocks_only_both_ends_are_exposed() -> None:
    """The root and the first block are waited for at the start, the last reductions and the totals at the end, and
    in between, between two micro-batches, the one and the other; and each micro-batch's last block, gathered again."""
    setup, cluster = replace(SETUP, tokens_per_pack=1 << 20, world=8), FAST
    moved = [(each, cluster.moved_in(each, setup)) for each in collectives(MODEL, setup)]
    time = {(each.kind, each.unit): seconds for each, seconds in moved}
    start = time["all_gather", "root"] + time["all_gather", "block 0"]
    again = time["all_gather", "block 21"]
    # What is left of the links' work when the last block's backward pass ends: its gradients, and the root's.
    end = time["reduce_scatter", "block 0"] + time["reduce_scatter", "root"]
    step = step_time(MODEL, setup, cluster)
    assert step.exposed == pytest.approx(2 * (start + again + end) + time["all_reduce", "totals"])
    assert step.exposed < 0.01 * step.total


def test_of_the_sums_over_copies_only_the_roots_shows() -> None:
    setup = replace(SETUP, tokens_per_pack=1 << 20, replicas=8)
    one_copy = replace(setup, world=8, replicas=1)
    moved = [(each, FAST.moved_in(each, setup)) for each in collectives(MODEL, setup)]
    time = {(each.kind, each.unit): seconds for each, seconds in moved}
    # Both wait for the first block's gradients: the root's, to be scattered, and the block's, to be summed.
    scattered = time["reduce_scatter", "root"]
    shown = max(scattered, time["all_reduce", "block 0"]) + time["all_reduce", "root"] - scattered
    totals = time["all_reduce", "totals"] - FAST.moved_in(collectives(MODEL, one_copy)[-1], one_copy)
    longer = step_time(MODEL, setup, FAST).total - step_time(MODEL, one_copy, FAST).total
    assert longer == pytest.approx(shown + totals)


@settings(deadline=None)
@given(
    network=st.floats(1e9, 1e12),
    faster=st.floats(1.0, 100.0),
    replicas=st.sampled_from([1, 2, 8, 64]),
    tokens=st.sampled_from([1024, 16384]),
    reshard=st.booleans(),
)
def test_a_step_takes_at_least_what_computes_and_at_most_all_in_a_row(
    network: float, faster: float, replicas: int, tokens: int, reshard: bool
) -> None:
    setup = replace(SETUP, replicas=replicas, tokens_per_pack=tokens, context=1024, reshard_after_forward=reshard)
    config = replace(MODEL, num_layers=4)
    step = step_time(config, setup, Cluster("A100", network, 0.5))
    assert step.computing <= step.total <= (step.computing + step.moving) * (1 + 1e-9)
    quicker = step_time(config, setup, Cluster("A100", network * faster, 0.5))
    assert quicker.total <= step.total * (1 + 1e-9)
