"""Learning rates at the points where a schedule is defined."""

from __future__ import annotations

import pytest

from engine.schedule import ScheduleConfig, learning_rate
from model.errors import InputError

STEPS, PEAK = 1000, 2.0


def rate(step: int, **options: object) -> float:
    return learning_rate(step, STEPS, PEAK, ScheduleConfig(warmup_steps=100, final_ratio=0.1, **options))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_starts_above_zero_and_meets_the_peak(kind: str) -> None:
    assert rate(0, kind=kind) == pytest.approx(PEAK / 100)
    assert rate(49, kind=kind) == pytest.approx(PEAK / 2)
    assert rate(99, kind=kind) == rate(100, kind=kind) == PEAK


def test_each_kind_passes_through_its_middle_and_end() -> None:
    assert rate(550, kind="cosine") == pytest.approx(PEAK * 0.55)
    assert rate(325, kind="cosine") == pytest.approx(PEAK * (0.1 + 0.9 * 0.8535533905932737))
    assert rate(550, kind="linear") == pytest.approx(PEAK * 0.55)
    assert rate(999, kind="constant") == PEAK
    assert rate(800, kind="wsd", decay_ratio=0.2) == PEAK
    assert rate(900, kind="wsd", decay_ratio=0.2) == pytest.approx(PEAK * 0.55)
    for kind in ("cosine", "linear", "wsd"):
        assert rate(STEPS, kind=kind) == pytest.approx(PEAK * 0.1)
        assert rate(STEPS - 1, kind=kind) > PEAK * 0.1


def test_a_run_shorter_than_its_warm_up_still_has_rates() -> None:
    assert [learning_rate(s, 2, 1.0, ScheduleConfig(warmup_steps=4)) for s in range(2)] == [0.25, 0.5]
    assert learning_rate(0, 1, 1.0, ScheduleConfig()) == 1.0


def test_a_ratio_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"final_ratio is 1\.5"):
        ScheduleConfig(final_ratio=1.5).check()
