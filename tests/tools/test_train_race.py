"""Who runs when, beside whom, and what becomes of those that fail; on a GPU that is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tools import train_race
from tools.train_data import Step
from tools.train_parts import PARTS, Parts
from tools.train_race import OURS, Contender, Outcome, Sizes, measure

SIZES = Sizes(warm=1, steps=2, laps=2, traced=1)
STEPS = [Step([10 * number], 1, []) for number in range(1, SIZES.total + 1)]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Fake:
    """Holds so much memory while it lives; from its n-th step on there may be too little."""

    settings, padding_share, data_wait = "as it is", 0.25, 0.0

    def __init__(self, name: str, log: list[str], held: int = 100, full_at: int = 99, breaks: bool = False) -> None:
        if breaks:
            raise RuntimeError("its version does not fit\nand more")
        self.name, self.log, self.held, self.full_at = name, log, held, full_at
        self.taken = 0
        log.append(f"{name} begins")
        memory["now"] += held
        memory["peak"] = max(memory["peak"], memory["now"])

    def step(self) -> None:
        self.taken += 1
        if self.taken >= self.full_at:
            raise torch.cuda.OutOfMemoryError
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

    return measure(builders, STEPS, SIZES, device, 100, has_time)


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
    assert [lap.tokens for lap in outcomes[OURS].laps] == [20 + 30, 40 + 50]


def test_on_a_processor_they_take_turns() -> None:
    log: list[str] = []
    outcomes = run({OURS: lambda: Fake("a", log), "peer": lambda: Fake("b", log)}, CPU)
    turns = "".join(entry for entry in log if len(entry) == 1)
    assert turns.startswith("a" + "b" + "aabb" + "bbaa")
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


def test_who_fails_under_the_profiler_keeps_its_laps_and_gives_its_memory_back() -> None:
    log: list[str] = []
    traced = SIZES.warm + SIZES.laps * SIZES.steps + 1
    builders: dict[str, Callable[[], Contender]] = {
        OURS: lambda: Fake(OURS, log),
        "large": lambda: Fake("large", log, full_at=traced),
        "last": lambda: Fake("last", log),
    }
    outcomes = run(builders, GPU)
    assert len(outcomes["large"].laps) == SIZES.laps and outcomes["large"].failure == ""
    assert memory["now"] == 7 and log.index("large ends") < log.index("last begins")


def test_ours_that_does_not_fit_leaves_it_to_the_caller_before_any_peer_runs() -> None:
    log: list[str] = []
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run({OURS: lambda: Fake(OURS, log, full_at=1), "peer": lambda: Fake("peer", log)}, GPU)
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
