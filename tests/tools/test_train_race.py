"""Who runs when, beside whom, and what becomes of those that fail; on a GPU that is none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from tools import train_race
from tools.train_data import Step
from tools.train_parts import PARTS, Parts
from tools.train_race import OURS, Contender, Outcome, Sizes, measure

SIZES = Sizes(warm=1, steps=2, laps=3, traced=1)
STEPS = [Step([10 * number], 1, []) for number in range(1, SIZES.total + 1)]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Fake:
    """Holds so much memory while it lives; from its n-th step on there may be too little, or another failure."""

    settings, padding_share, data_wait = "as it is", 0.25, 0.0

    def __init__(
        self,
        name: str,
        log: list[str],
        held: int = 100,
        full_at: int = 99,
        breaks: bool = False,
        failing: Callable[[], Exception] = torch.cuda.OutOfMemoryError,
    ) -> None:
        if breaks:
            raise RuntimeError("its version does not fit\nand more")
        self.name, self.log, self.held, self.full_at, self.failing = name, log, held, full_at, failing
        self.taken = 0
        log.append(f"{name} begins")
        memory["now"] += held
        memory["peak"] = max(memory["peak"], memory["now"])

    def step(self) -> None:
        self.taken += 1
        if self.taken >= self.full_at:
            raise self.failing()
        self.log.append(self.name)
        memory["peak"] = max(memory["peak"], memory["now"] + 50)

    def close(self) -> None:
        self.log.append(f"{self.name} ends")
        memory["now"] -= self.held


memory: dict[str, int] = {}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.update(now=7, peak=7)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: memory.update(peak=memory["now"]))
    monkeypatch.setattr(train_race, "trace", lambda step, steps, device: [step() for _ in range(steps)])
    seconds = dict.fromkeys(PARTS, 0.0)
    monkeypatch.setattr(train_race, "parts", lambda events, steps, vocabulary: Parts(seconds, 0.0, None, []))


def run(builders: dict[str, Callable[[], Contender]], device: torch.device, until: int = 99) -> dict[str, Outcome]:
    asked: list[int] = []

    def has_time() -> bool:
        asked.append(1)
        return len(asked) <= until

    return dict(measure(builders, STEPS, SIZES, device, 100, has_time))


def test_on_a_gpu_each_is_alone_and_ours_is_first_and_last() -> None:
    log: list[str] = []
    outcomes = run({OURS: lambda: Fake(OURS, log), "peer": lambda: Fake("peer", log, 300)}, GPU)
    steps = SIZES.warm + SIZES.laps * SIZES.steps
    ours, peer = ["ours begins", *["ours"] * (steps + 1), "ours ends"], ["peer"] * (steps + 1)
    assert log == [*ours, "peer begins", *peer, "peer ends", "ours begins", *["ours"] * steps, "ours ends"]
    assert (len(outcomes[OURS].laps), len(outcomes["peer"].laps)) == (2 * SIZES.laps, SIZES.laps)
    assert (outcomes[OURS].peak, outcomes["peer"].peak) == (150, 350)
    assert memory["now"] == 7


def test_laps_count_the_tokens_of_the_steps_that_they_took() -> None:
    log: list[str] = []
    outcomes = run({OURS: lambda: Fake(OURS, log)}, GPU)
    assert [lap.tokens for lap in outcomes[OURS].laps] == [20 + 30, 40 + 50, 60 + 70]


def test_on_a_processor_they_take_turns() -> None:
    log: list[str] = []
    outcomes = run({OURS: lambda: Fake("a", log), "peer": lambda: Fake("b", log)}, CPU)
    turns = "".join(entry for entry in log if len(entry) == 1)
    assert turns.startswith("a" + "b" + "aabb" + "bbaa" + "aabb")
    assert outcomes[OURS].peak is None and outcomes["peer"].padding == 0.25


@pytest.mark.parametrize("device", [GPU, CPU])
def test_a_peer_that_fails_is_said_and_the_others_run(device: torch.device) -> None:
    log: list[str] = []
    outcomes = run(
        {
            OURS: lambda: Fake(OURS, log),
            "broken": lambda: Fake("broken", log, breaks=True),
            "large": lambda: Fake("large", log, full_at=1),
            "last": lambda: Fake("last", log),
        },
        device,
    )
    assert outcomes["broken"].failure == "RuntimeError: its version does not fit"
    assert outcomes["large"].failure == "does not fit" and not outcomes["large"].laps
    assert outcomes["last"].laps and outcomes[OURS].laps
    assert memory["now"] == 7 and "large ends" in log


def begun(lap: int) -> int:
    """The first step of a lap."""
    return SIZES.warm + (lap - 1) * SIZES.steps + 1


@pytest.mark.parametrize("device", [GPU, CPU])
def test_who_fails_in_a_lap_keeps_those_before_and_ends_alone(device: torch.device) -> None:
    log: list[str] = []

    def lost() -> Exception:
        return ValueError("a shape changed\nand more")

    outcomes = run(
        {
            OURS: lambda: Fake(OURS, log),
            "broken": lambda: Fake("broken", log, full_at=begun(SIZES.laps), failing=lost),
            "large": lambda: Fake("large", log, full_at=begun(SIZES.laps)),
            "last": lambda: Fake("last", log),
        },
        device,
    )
    assert outcomes["broken"].failure == "ValueError: a shape changed (after 2 laps)"
    assert outcomes["large"].failure == "out of memory (after 2 laps)"
    assert all(len(outcomes[name].laps) == SIZES.laps - 1 for name in ("broken", "large"))
    assert [lap.tokens for lap in outcomes["broken"].laps] == [lap.tokens for lap in outcomes["last"].laps][:-1]
    assert outcomes["broken"].settings == "as it is" and outcomes["broken"].parts is None
    assert len(outcomes["last"].laps) == SIZES.laps and outcomes["last"].parts and not outcomes["last"].failure
    assert not outcomes[OURS].failure
    assert memory["now"] == 7 and log.count("broken ends") == log.count("large ends") == 1


@pytest.mark.parametrize("device", [GPU, CPU])
@pytest.mark.parametrize("name", [OURS, "large"])
def test_who_fails_under_the_profiler_keeps_all_laps_and_gives_its_memory_back(device: torch.device, name: str) -> None:
    log: list[str] = []

    def fake(of: str) -> Fake:
        return Fake(of, log, full_at=begun(SIZES.laps + 1) if of == name else 99)

    outcomes = run({OURS: lambda: fake(OURS), "large": lambda: fake("large"), "last": lambda: fake("last")}, device)
    assert len(outcomes[name].laps) >= SIZES.laps and outcomes[name].failure.startswith("out of memory (after")
    assert outcomes["last"].laps and not outcomes["last"].failure
    assert memory["now"] == 7 and f"{name} ends" in log


class Weights:
    """What a cycle holds until the collector comes, as a compiled model does."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("where", ["building", "a step"])
def test_the_frames_of_a_failure_hold_nothing_when_the_next_one_begins(where: str) -> None:
    held: list[weakref.ref[Weights]] = []
    log: list[str] = []

    def fails() -> Exception:
        weights = Weights()  # a local of a frame that the traceback holds
        held.append(weakref.ref(weights))
        raise torch.cuda.OutOfMemoryError

    def large() -> Contender:
        if where == "building":
            fails()
        return Fake("large", log, full_at=1, failing=fails)

    def last() -> Contender:
        assert [weights() for weights in held] == [None]
        return Fake("last", log)

    gc.disable()
    try:
        outcomes = run({OURS: lambda: Fake(OURS, log), "large": large, "last": last}, GPU)
    finally:
        gc.enable()
    assert outcomes["large"].failure == "does not fit" and not outcomes["last"].failure


def test_each_outcome_is_told_before_the_next_one_begins() -> None:
    log: list[str] = []
    builders = {name: lambda name=name: Fake(name, log) for name in (OURS, "peer")}  # type: ignore[misc]
    for name, outcome in measure(builders, STEPS, SIZES, GPU, 100, lambda: True):
        log.append(f"{name} told of {len(outcome.laps)}")
    events = [entry for entry in log if " " in entry]
    ours, peer = [f"{OURS} begins", f"{OURS} ends"], ["peer begins", "peer ends", "peer told of 3"]
    assert events == [*ours, f"{OURS} told of 3", *peer, *ours, f"{OURS} told of 6"]


@pytest.mark.parametrize("step", [1, begun(SIZES.laps)])
def test_ours_that_does_not_fit_leaves_it_to_the_caller_before_any_peer_runs(step: int) -> None:
    log: list[str] = []
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run({OURS: lambda: Fake(OURS, log, full_at=step), "peer": lambda: Fake("peer", log)}, GPU)
    assert "peer begins" not in log


def test_a_mistake_of_ours_is_no_outcome() -> None:
    with pytest.raises(RuntimeError, match="its version"):
        run({OURS: lambda: Fake(OURS, [], breaks=True)}, CPU)


def test_when_time_is_over_nobody_begins_any_more() -> None:
    log: list[str] = []
    builders: dict[str, Callable[[], Contender]] = {
        name: lambda name=name: Fake(name, log)  # type: ignore[misc]
        for name in (OURS, "first", "second")
    }
    outcomes = run(builders, GPU, until=1)
    assert list(outcomes) == [OURS, "first"]
    assert [entry for entry in log if "begins" in entry] == ["ours begins", "first begins"]
