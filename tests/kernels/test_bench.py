"""The benchmark on a processor: what it counts, how it times, what it says of wrong, failing and missing contenders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.bench import clock, measure, peers, work
from kernels.bench.adapting import low_rank_workload
from kernels.bench.attending import attention_workload, decode_workload
from kernels.bench.ceilings import Ceilings, measure_ceilings
from kernels.bench.clock import CpuClock, Round, Times, race
from kernels.bench.eight_bits import fp8_linear_workload
from kernels.bench.head import linear_cross_entropy_workload, linear_logprob_workload
from kernels.bench.rowwise import cross_entropy_workload, norm_workload, swiglu_workload
from kernels.bench.turning import rotary_workload
from kernels.bench.updating import (
    adamw_workload,
    gae_workload,
    grad_norm_workload,
    parameter_sizes,
    sample_workload,
)
from kernels.bench.workload import OURS, Contender, Work, Workload
from kernels.bench.workloads import BY_OP, RAGGED, workloads
from tests.kernels.bench_jobs import CPU, FP32, UNIT, Stopwatch, doubling, few_rounds

__all__ = ["few_rounds"]  # a fixture for every test here

# What is counted


def test_bytes_and_operations_are_those_counted_by_hand() -> None:
    T, N, b = 8192, 4096, 2
    assert work.norm_work(T, N, b, False) == {"forward": Work(134_225_920), "backward": Work(201_342_976)}
    assert work.norm_work(T, N, b, True) == {"forward": Work(268_443_648), "backward": Work(268_451_840)}
    # Gate and up in and y out, 3 TFb; dy, gate and up in, two gradients out, 5 TFb.
    assert work.swiglu_work(8192, 11008, 2) == {"forward": Work(541_065_216), "backward": Work(901_775_360)}
    assert work.rotary_work(10, 3, 8, 5, 2)["forward"] == Work(2 * 10 * 3 * 8 * 2 + 80 + 160)
    assert work.cross_entropy_work(100, 1000, 2) == {"forward": Work(201_200), "backward": Work(401_200)}
    head = work.head_work(8192, 4096, 39424, 2)
    assert head["forward"].flops == 2 * 8192 * 4096 * 39424 == 2_645_699_854_336
    assert head["backward"].flops == 2 * head["forward"].flops
    assert head["forward"].bytes == (8192 + 39424) * 4096 * 2 + 12 * 8192


def test_adapters_are_counted_beside_the_products_of_the_frozen_weight() -> None:
    # 10 tokens, 6 inputs, 7 outputs of which 5 have an adapter of rank 2.
    counted = work.low_rank_work(10, 6, 7, [5], 2, b=2)
    frozen, thin = 2 * 10 * 6 * 7, 2 * 10 * (6 * 2 + 5 * 2)
    assert counted["forward"] == Work(2 * (10 * 6 + 10 * 7 + 6 * 7 + 2 * 6 + 5 * 2), frozen + thin)
    # dy, x, the weight and the adapters in, their gradients and dx out; du, dB, dA and dx of each adapter
    assert counted["backward"] == Work(2 * (10 * 7 + 2 * 10 * 6 + 6 * 7 + 2 * (2 * 6 + 5 * 2)), frozen + 2 * thin)


def test_operations_of_8_bits_count_half() -> None:
    # 10 tokens, 16 inputs, 32 outputs, 2 operations each.
    counted = work.fp8_linear_work(10, 16, 32, 2)
    assert counted["forward"] == Work(2 * (160 + 320 + 512), 10 * 16 * 32)
    assert counted["backward"] == Work(2 * (320 + 2 * 160 + 2 * 512), 2 * 10 * 16 * 32)


def test_attention_counts_visible_pairs_only() -> None:
    # Lengths 3 and 2: 6 and 3 pairs. Two heads of 4 read one key-value head.
    counted = work.attention_work([3, 2], heads=2, kv_heads=1, width=4, b=2)
    assert counted["forward"].flops == 4 * 9 * 2 * 4
    assert counted["backward"].flops == 10 * 9 * 2 * 4
    assert counted["forward"].bytes == 2 * (5 * 2 * 4 * 2) + 2 * (5 * 1 * 4 * 2)
    assert counted["backward"].bytes == 2 * counted["forward"].bytes
    # 16384 causal: the figure usual in the literature, 2 S^2 H h, and the diagonal.
    long = work.attention_work([16384], 32, 32, 128, 2)["forward"].flops
    assert long == 2 * 16384 * 16385 * 32 * 128


def test_what_has_no_backward_is_counted_once() -> None:
    assert work.decode_work([7, 3], 4, 2, 8, 2)["forward"] == Work(
        2 * 10 * 2 * 8 * 2 + 2 * 2 * 4 * 8 * 2, 4 * 10 * 4 * 8
    )
    assert work.adamw_work(1000) == {"forward": Work(28_000)}
    assert work.adamw_work(1000, has_shadow=True) == {"forward": Work(30_000)}
    assert work.grad_norm_work(1000) == {"forward": Work(4000)}
    assert work.sample_work(64, 1000, 2) == {"forward": Work(129_280)}
    assert work.gae_work(100) == {"forward": Work(1700)}


def test_the_floor_is_the_larger_of_two_times() -> None:
    assert UNIT.floor(moved=2e6, operations=1e9) == 2.0
    assert UNIT.floor(moved=2e6, operations=5e9) == 5.0


def test_both_passes_together_are_their_sum() -> None:
    job = swiglu_workload(8, 4, FP32, CPU)
    assert job.work_of("both") == Work(8 * 4 * 4 * 8)


def test_parameters_are_spread_without_losing_any() -> None:
    sizes = parameter_sizes(500_000_000, 300)
    assert len(sizes) == 300 and sum(sizes) == 500_000_000
    assert sizes[0] == 4096 and min(sizes[100:]) > 2_000_000


# How it is timed


def test_contenders_take_turns_and_the_order_turns_round() -> None:
    now, order = Stopwatch(), []

    def contender(name: str, seconds: float) -> Round:
        def run() -> None:
            order.append(name)
            now.work(seconds)

        return Round(run, calls=4)

    times = race(CpuClock(now), {"a": contender("a", 0.008), "b": contender("b", 0.02)})
    assert order == ["a", "a", "b", "b", "a", "b", "b", "a"]  # two to warm up each, then in turn
    assert times["a"].median == pytest.approx(2.0) and times["b"].median == pytest.approx(5.0)


def test_percentiles_are_those_of_the_rounds() -> None:
    times = Times.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (times.median, times.p20, times.p80, times.rounds) == (3.5, 2.0, 5.0, 6)
    assert Times.of([7.0]) == Times(7.0, 7.0, 7.0, 1)


def test_short_rounds_are_repeated_often_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LEAST_ROUNDS", 20)
    monkeypatch.setattr(clock, "MOST_ROUNDS", 100)
    now = Stopwatch()
    rounds = {str(seconds): Round(partial(now.work, seconds), 1) for seconds in (0.0001, 0.004, 0.1, 2.0)}
    times = race(CpuClock(now), rounds)
    assert [one.rounds for one in times.values()] == [100, 62, 20, 5]


def test_a_contender_that_raises_drops_out_and_the_others_go_on() -> None:
    reported: dict[str, str] = {}
    calls = iter(range(100))

    def fails_late() -> None:
        if next(calls) == 2:
            raise RuntimeError("out of luck")

    def fails_at_once() -> None:
        raise KeyError("no")

    rounds = {"good": Round(lambda: None, 1), "late": Round(fails_late, 1), "bad": Round(fails_at_once, 1)}
    times = race(CpuClock(), rounds, lambda name, error: reported.update({name: measure.explain(error)}))
    assert list(times) == ["good"]
    assert reported == {"late": "failed: RuntimeError: out of luck", "bad": "failed: KeyError: 'no'"}
    with pytest.raises(KeyError):
        race(CpuClock(), {"bad": Round(fails_at_once, 1)})


def test_ceilings_are_the_best_rate_of_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = iter([1.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr("kernels.bench.ceilings._time", lambda *_: Times.of([next(milliseconds)]))
    ceilings, lines = measure_ceilings(CpuClock(), CPU, (1000, 3000), (10, 20))
    assert ceilings == Ceilings(copy=2 * 3000 / 1e-3, product=2 * 20**3 / 1e-3)
    assert len(lines) == 4


def test_every_set_of_arguments_is_its_own_and_results_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUND_BYTES", 1 << 30)
    monkeypatch.setattr(measure, "MOST_SETS", 3)
    seen: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        seen.append(2 * x.detach())
        return 2 * x

    measure.measure(doubling([Contender(OURS, double, "ours")]), CpuClock(), UNIT)
    *_, a, b, c = seen
    assert not torch.equal(a, b) and not torch.equal(b, c)


def test_a_pass_is_the_forward_the_backward_or_both() -> None:
    now = Stopwatch()

    class Working(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            now.work(0.001)
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            now.work(0.003)
            return 2 * dy

    rows = measure.measure(doubling([Contender(OURS, Working.apply, "ours")]), CpuClock(now), UNIT)
    found = {row.stage: row.times.median for row in rows if row.times is not None}
    assert found == pytest.approx({"forward": 1.0, "backward": 3.0, "both": 4.0})


def test_upstream_gradients_are_the_same_for_every_contender() -> None:
    given: dict[str, list[Tensor]] = {"a": [], "b": []}

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            given[ctx.name].append(dy.clone())
            return 2 * dy, None

    contenders = [Contender(name, lambda x, name=name: Spy.apply(x, name)) for name in given]
    measure.measure(doubling(contenders), CpuClock(), UNIT)
    assert torch.equal(given["a"][0], given["b"][0]) and given["a"][0].std() > 0.5


# What is right and wrong


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return dy


def nan_once(x: Tensor) -> Tensor:
    return 2 * torch.where(torch.arange(64) == 5, torch.nan, x)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda x: 2 * x, ""),
        (lambda x: 2.001 * x, "wrong: result 0 is off by 0.0005"),
        (HalfGradient.apply, "wrong: gradient of input 0 is off by 0.5"),
        (nan_once, "wrong: result 0 is off by nan"),
        (lambda x: (2 * x)[:63], "failed: RuntimeError: "),
    ],
    ids=["right", "result", "gradient", "nan", "shape"],
)
def test_a_wrong_contender_is_not_timed(call: Callable[[Tensor], Tensor], fault: str) -> None:
    rows = measure.measure(doubling([Contender("it", call)]), CpuClock(), UNIT)
    assert [row.stage for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert row.note.startswith(fault) and (row.note == "") == (fault == "")
        assert (row.times is None) == (fault != "")


def test_half_precision_is_allowed_two_last_places() -> None:
    def nearly(factor: float) -> str:
        contender = Contender("it", lambda x: (2 * x.float() * factor).bfloat16())
        return measure.fault(doubling([], torch.bfloat16), contender)

    assert nearly(1.005) == "" and nearly(1.02).startswith("wrong")


# Every op, from its tensors to its line


def tiny() -> Iterator[Workload]:
    norm = partial(norm_workload, dtype=FP32, device=CPU)
    yield norm(40, 16, with_residual=False)
    yield norm(40, 16, with_residual=True)
    yield norm(40, 16, with_residual=False, heads=4)
    yield rotary_workload(40, 4, 2, 16, FP32, CPU)
    yield rotary_workload(40, 4, 2, 16, FP32, CPU, is_split=True)
    yield swiglu_workload(40, 24, FP32, CPU)
    yield cross_entropy_workload(40, 100, FP32, CPU)
    yield linear_cross_entropy_workload(40, 16, 100, FP32, CPU)
    yield linear_logprob_workload(40, 16, 100, FP32, CPU, with_entropy=True)
    yield linear_logprob_workload(40, 16, 100, FP32, CPU, with_entropy=False)
    yield low_rank_workload(40, 16, (20, 12), 4, FP32, CPU)
    yield fp8_linear_workload(40, 16, 48, FP32, CPU)
    yield attention_workload([20, 20], 4, 2, 16, FP32, CPU)
    yield attention_workload([300, 8, 2], 4, 4, 16, FP32, CPU, name="ragged", equal_work=[290])
    yield decode_workload(3, 40, 4, 2, 16, FP32, CPU)
    yield decode_workload(3, 512, 4, 2, 16, FP32, CPU, paged=True)
    yield adamw_workload(5000, 9, CPU)
    yield adamw_workload(5000, 9, CPU, beside="nearest")
    yield adamw_workload(5000, 9, CPU, beside="random")
    yield adamw_workload(5000, 9, CPU, beside="remainder")
    yield grad_norm_workload(5000, 9, CPU)
    yield sample_workload(4, 100, FP32, CPU)
    yield gae_workload(6, 30, CPU)


@pytest.mark.parametrize("job", tiny(), ids=lambda job: job.name)
def test_every_op_and_every_peer_is_right_and_measured(job: Workload) -> None:
    rows = measure.measure(job, CpuClock(), UNIT)
    assert {(row.stage, row.contender) for row in rows} == {
        (stage, one.name) for stage in job.stages for one in job.contenders if stage in one.passes
    }
    for row in rows:
        assert row.note == "" and row.times is not None and row.times.median > 0, row
        assert row.floor > 0 and row.percent == pytest.approx(100 * row.floor / row.times.median)


def test_checks_of_ops_bite() -> None:
    """Of results that a check looks at only in part, or in a form of its own."""

    def broken(job: Workload, spoil: Callable[[Tensor], Tensor]) -> str:
        ours = job.contenders[0]

        def call(*inputs):
            results = ours.call(*inputs)
            return spoil(results) if isinstance(results, Tensor) else (spoil(results[0]), *results[1:])

        return measure.fault(job, replace(ours, call=call))

    def double(x: Tensor) -> Tensor:
        return 2 * x

    for job in (
        attention_workload([8, 8], 2, 1, 16, FP32, CPU),
        decode_workload(3, 512, 4, 2, 16, FP32, CPU, paged=True),
        grad_norm_workload(500, 9, CPU),
        gae_workload(6, 30, CPU),
    ):
        assert broken(job, double).startswith("wrong"), job.name
    assert broken(sample_workload(4, 100, FP32, CPU), lambda token: (token + 1) % 100).startswith("wrong")
    # The moments and the parameters are changed in place, whole or in halves.
    for job, lists in ((adamw_workload(500, 9, CPU), 4), (adamw_workload(500, 9, CPU, beside="remainder"), 5)):
        ours = job.contenders[0]

        def lazy(*inputs, ours=ours, lists=lists):
            return ours.call(*[x[:-1] for x in inputs[:lists]], *inputs[lists:])

        assert measure.fault(job, replace(ours, call=lazy)).startswith("wrong: change of p 8")


def test_a_compiled_peer_runs_its_backward_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    job = norm_workload(8, 16, FP32, CPU, with_residual=False, compiled=True)
    rows = {row.stage: row for row in measure.measure(job, CpuClock(), UNIT) if row.contender == "compile"}
    assert [row.note for row in rows.values()] == ["", "", ""]
    assert all(row.times is not None for row in rows.values())


def test_peers_that_are_missing_are_listed_with_a_reason() -> None:
    peers.module.cache_clear()
    absent = peers.missing(CPU)
    assert "cudnn" in absent
    for peer in ("liger", "flash2", "flash3"):
        installed = not isinstance(peers.module(peers.PLACES[peer][-1]), str)
        assert installed or "No module named" in absent[peer] or "Error" in absent[peer]
    assert peers.liger("no_such_op", "LigerNothing") is None


def test_the_list_begins_with_every_op_and_can_be_cut() -> None:
    whole = workloads(CPU)
    assert {job.op for job in whole} == set(BY_OP)
    assert [job.op for job in whole[: len(BY_OP)]] == list(BY_OP)
    assert len({job.name for job in whole}) == len(whole)
    assert [job.op for job in workloads(CPU, is_quick=True)] == list(BY_OP)
    assert {job.op for job in workloads(CPU, ["rms_norm", "swiglu"])} == {"rms_norm", "swiglu"}
    assert sum(RAGGED) == 32768
