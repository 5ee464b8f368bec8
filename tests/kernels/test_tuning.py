"""The tuner without a GPU: kernels are not started, a clock says how long each candidate took."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import launches
from kernels.attention import dispatch
from kernels.attention.decode import candidates
from kernels.backend import Chip, observed_launches
from kernels.bench import clock, tuning
from kernels.bench.attending import attention_workload, decode_workload
from kernels.bench.tuning import Choice, Order, lookups, order_providers, tune_launches, write_launches, write_providers

CPU = torch.device("cpu")
KERNEL, ENTRY = "decode_attention", "sm_90 16-bit 64"
CANDIDATES = candidates(90, torch.float16, 64)


@dataclass
class KernelClock:
    """A round takes what `cost` says of the options of the kernels it would have started."""

    kernel: str
    cost: Callable[[dict[str, Any]], float]
    started: list[dict[str, Any]] = field(default_factory=list)
    measures_memory = False

    def observe(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if kernel.__name__ == self.kernel:
            self.started.append(options)

    def warm_up(self, run: Callable[[], None]) -> tuple[float, float]:
        return 0.0, self.take(run, 0.0)()

    def take(self, run: Callable[[], None], enqueue: float) -> Callable[[], float]:
        self.started.clear()
        run()
        milliseconds = self.cost(self.started[-1]) if self.started else 1.0
        return lambda: milliseconds

    def finish(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(clock, "MOST_ROUNDS", 2)


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Kernels do not run, and interpreted ones do not compile: what is made of them is supposed.

    `products` is a function of the options.
    """
    supposed = SimpleNamespace(fault="", spilled=0, shared=0, products=lambda options: "mma")

    def record(call: Callable[[], Any], arch: int) -> list[dict[str, Any]]:
        launched: list[dict[str, Any]] = []
        with observed_launches(lambda kernel, grid, args, options: launched.append(options), Chip(arch, 132)):
            call()
        return launched

    def compile_launch(options: dict[str, Any], arch: int) -> SimpleNamespace:
        figures = supposed.spilled, supposed.shared, supposed.products(options)
        return SimpleNamespace(**dict(zip(("spilled", "shared", "products"), figures, strict=True)))

    monkeypatch.setattr(tuning, "fault", lambda *_: supposed.fault)
    monkeypatch.setattr(tuning, "record", record)
    monkeypatch.setattr(tuning, "compile_launch", compile_launch)
    return supposed


def tune(cost: Callable[[dict[str, Any]], float], **options: Any) -> list[Choice]:
    job = decode_workload(2, 32, 2, 1, 64, torch.float16, CPU)
    timing = KernelClock("_decode_attention_fwd_kernel", cost)
    with observed_launches(timing.observe, Chip(90, 132)):
        given = {"kernels": [KERNEL], "is_up": lambda: False} | options
        return list(tune_launches([job], timing, **given))


def present() -> dict[str, int]:
    return launches.read_table()[KERNEL][ENTRY]


def another() -> dict[str, int]:
    return next(one for one in reversed(CANDIDATES) if one != present())


def favours(favourite: dict[str, int]) -> Callable[[dict[str, Any]], float]:
    return lambda options: 1.0 if all(options.get(name) == value for name, value in favourite.items()) else 2.0


def test_a_pass_asks_the_table_for_its_own_kernels() -> None:
    job = attention_workload([32, 32], 2, 1, 64, torch.float16, CPU)
    with observed_launches(lambda *_: None, Chip(90, 132)):
        forward, backward = ([one.kernel for one in lookups(job, stage)] for stage in ("forward", "backward"))
        decoding = lookups(decode_workload(2, 32, 2, 1, 64, torch.float16, CPU), "forward")
    assert forward == ["attention_fwd"]
    assert set(backward) == {"attention_bwd_dq", "attention_bwd_dkdv"}
    assert [(one.kernel, one.key) for one in decoding] == [("decode_attention", ENTRY)]


def test_the_fastest_candidate_is_chosen_of_all(sound: SimpleNamespace) -> None:
    (choice,) = tune(favours(another()))
    assert (choice.kernel, choice.key) == (KERNEL, ENTRY)
    assert choice.options == another() and not choice.kept
    assert (choice.before, choice.best, choice.tried) == (2.0, 1.0, len(CANDIDATES))


def test_the_present_entry_stays_unless_another_is_clearly_faster(sound: SimpleNamespace) -> None:
    (choice,) = tune(lambda options: 1.0 if favours(another())(options) == 1.0 else 1.005)
    assert choice.kept and choice.options == present() and choice.best == choice.before == 1.005


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"fault": "wrong: result is off by 0.5 of its norm"}, "wrong: result is off"),
        ({"spilled": 8}, "spills"),
        ({"shared": 1 << 20}, "shared memory"),
    ],
    ids=["wrong", "spills", "memory"],
)
def test_a_fast_candidate_that_breaks_a_limit_is_passed_over(
    trouble: dict[str, Any], reason: str, sound: SimpleNamespace
) -> None:
    vars(sound).update(trouble)
    (choice,) = tune(favours(another()))
    assert choice.kept and choice.options == present()
    assert reason in choice.note and tuning.short(another()) in choice.note


def test_a_candidate_must_keep_the_matrix_instruction(sound: SimpleNamespace) -> None:
    sound.products = lambda options: None if favours(another())(options) == 1.0 else "mma"
    (choice,) = tune(favours(another()))
    assert choice.kept and f"{tuning.short(another())} uses other matrix instructions" in choice.note


def test_a_candidate_that_cannot_be_started_is_noted(sound: SimpleNamespace) -> None:
    def cost(options: dict[str, Any]) -> float:
        if favours(another())(options) == 1.0:
            raise RuntimeError("out of resource: shared memory")
        return 2.0

    (choice,) = tune(cost)
    assert choice.kept and f"{tuning.short(another())} failed: RuntimeError: out of resource" in choice.note


def test_nothing_is_begun_when_the_time_is_up(sound: SimpleNamespace) -> None:
    assert tune(lambda _: 1.0, is_up=lambda: True) == []
    assert tune(lambda _: 1.0, kernels=["nothing"]) == []


def test_writing_leaves_other_entries_alone(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    path.write_text(launches.PATH.read_text())
    before = json.loads(path.read_text())
    choice = Choice(KERNEL, ENTRY, "at", 2, 2.0, 1.0, another(), False)
    write_launches([choice], path)
    after = json.loads(path.read_text())
    assert after[KERNEL].pop(ENTRY) == another() != before[KERNEL].pop(ENTRY)
    assert after == before
    write_launches([Choice(KERNEL, ENTRY, "at", 2, 2.0, 2.0, present(), True)], path)
    assert path.read_text() == launches.PATH.read_text()  # format and order of the committed file


def orders() -> Iterator[Order]:
    job = attention_workload([8, 8], 2, 1, 64, torch.float16, CPU)
    yield from order_providers([job], clock.CpuClock(), 90)


def test_providers_are_ordered_by_time_for_both_passes(tmp_path: Path) -> None:
    found = list(orders())
    assert [one.key for one in found] == ["sm_90 64 forward", "sm_90 64 training"]
    for order in found:
        assert set(order.milliseconds) == {"triton", "sdpa"}
        assert list(order.milliseconds.values()) == sorted(order.milliseconds.values())
    path = tmp_path / "providers.json"
    path.write_text(dispatch.PATH.read_text())
    before = json.loads(path.read_text())
    write_providers([Order("sm_90 64 forward", {"sdpa": 1.0, "triton": 2.0})], "a chip, a day, a commit", path)
    after = json.loads(path.read_text())
    line = after.pop("sm_90 64 forward")
    assert line == {"measured": "a chip, a day, a commit: sdpa 1 ms, triton 2 ms", "order": ["sdpa", "triton"]}
    before.pop("sm_90 64 forward")
    assert after == before


def test_the_page_names_what_was_tried_and_what_won() -> None:
    choices = [
        Choice("attention_fwd", ENTRY, "at", 9, 2.0, 1.0, {"BLOCK_Q": 64}, False, "a spills"),
        Choice("attention_fwd", "sm_90 16-bit 128", "at", 9, 2.0, 2.0, {"BLOCK_Q": 32}, True),
    ]
    text = tuning.tuning_page({"device": "NVIDIA H200"}, choices, [Order("sm_90 64 forward", {"sdpa": 1.0})])
    assert "| attention_fwd | sm_90 16-bit 64 | at | 9 | 2 | 1 | BLOCK_Q=64 | a spills |" in text
    assert "| attention_fwd | sm_90 16-bit 128 | at | 9 | 2 | 2 | kept |  |" in text
    assert "| sm_90 64 forward | sdpa 1 ms |" in text
