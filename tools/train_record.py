"""What the training benchmark says of a contender in a case, and whether what was aimed at is met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from engine.benchmark import median_speed, useful_flops
from engine.memory import MemoryPlan
from tools.train_cases import Case
from tools.train_data import Step
from tools.train_race import OURS, Outcome, Sizes

Record = dict[str, Any]
PEERS = {"transformers": "transformers, SDPA", "liger": "transformers, Liger", "plain": "plain decoder"}


def record(
    case: Case, name: str, outcome: Outcome, steps: list[Step], sizes: Sizes, plan: MemoryPlan, peak_flops: float | None
) -> Record:
    """Everything as numbers that JSON knows; what was not measured is None.

    Args:
        steps: that all contenders take.
        plan: of our side.
        peak_flops: of the device; None where it is not known.
    """
    found: Record = {
        "case": case.name,
        "layers": case.model.num_layers,
        "parameters": case.model.num_parameters,
        "contender": name,
        "settings": outcome.settings,
        "failure": outcome.failure,
    }
    if not outcome.laps:
        return found
    speed = median_speed(outcome.laps)
    timed = steps[sizes.warm :][: min(len(outcome.laps), sizes.laps) * sizes.steps]
    tokens = [step.tokens for step in timed]
    flops = sum(useful_flops(case.model, step.lengths) for step in timed) / sum(tokens)  # a real token
    step_seconds = statistics.median(lap.seconds for lap in outcome.laps) / sizes.steps
    found |= {
        "tokens_per_second": speed,
        "mfu": speed * flops / peak_flops if peak_flops else None,
        "flops_per_token": flops,
        "tokens_per_step": sum(tokens) / len(tokens),
        "median_document": statistics.median(size for step in timed for size in step.lengths),
        "seconds_per_step": step_seconds,
        "laps": [round(lap.speed, 1) for lap in outcome.laps],
        "peak_bytes": outcome.peak,
        "planned_bytes": plan.peak.total if name == OURS else None,
        "padding": outcome.padding,
        "data_wait": sum(lap.data_wait for lap in outcome.laps) / sum(lap.seconds for lap in outcome.laps),
    }
    if outcome.parts is not None:
        parts, is_on_gpu = outcome.parts, outcome.peak is not None
        # A CPU's operators were timed under the profiler, which slows them: only their shares say something.
        whole = step_seconds if is_on_gpu else parts.busy
        found |= {
            "parts": parts.seconds,
            "launch_gaps": max(0.0, 1 - parts.busy / whole) if is_on_gpu else None,
            "step_gap": None if parts.gap is None else parts.gap / step_seconds,
            "shares": {part: seconds / whole for part, seconds in parts.seconds.items()},
            "largest": parts.largest,
        }
    return found


@dataclass(frozen=True)
class Verdict:
    """A target for one H200: what was aimed at, where, what was found; `is_met` None where it was not measured."""

    case: str
    target: str
    found: str
    is_met: bool | None

    @property
    def text(self) -> str:
        return "not measured" if self.is_met is None else "met" if self.is_met else "missed"


def verdicts(records: Iterable[Record]) -> list[Verdict]:
    """All targets that the records of one device can answer.

    Args:
        records: one for each contender of each case.
    """
    found = {(one["case"], one["contender"]): one for one in records}
    told: list[Verdict] = []

    def judge(case: str, target: str, value: float | None, limit: float, is_floor: bool, text: str) -> None:
        is_met = None if value is None else (value >= limit if is_floor else value < limit)
        told.append(Verdict(case, target, "" if value is None else text.format(value), is_met))

    def number(case: str, contender: str, key: str) -> float | None:
        return found.get((case, contender), {}).get(key)

    for case in dict.fromkeys(case for case, _ in found):
        ours = found.get((case, OURS), {})
        if case in ("7b-4096-full", "1b-4096-full"):
            judge(case, "MFU at least 50%", ours.get("mfu"), 0.5, True, "{:.1%}")
        speed = ours.get("tokens_per_second")
        for peer, limit in (("liger", 1.3), ("plain", 1.1)):
            if (case, peer) in found:
                ratio = _ratio(speed, number(case, peer, "tokens_per_second"))
                judge(case, f"at least {limit} × {PEERS[peer]}", ratio, limit, True, "{:.2f} ×")
        if (case, "liger") in found:
            memory = _ratio(ours.get("peak_bytes"), number(case, "liger", "peak_bytes"))
            judge(case, "no more memory than Liger", memory, 1.0 + 1e-9, False, "{:.2f} ×")
        if case.endswith("-sft"):
            whole = number(case.removesuffix("sft") + "full", OURS, "tokens_per_second")
            text = "at least 95% of the tokens/s of full-length documents"
            judge(case, text, _ratio(speed, whole), 0.95, True, "{:.1%}")
        for contender in (name for at, name in found if at == case and name.endswith("fp8")):
            ratio = _ratio(number(case, contender, "tokens_per_second"), speed)
            judge(case, "FP8 at least 1.25 × bf16", ratio, 1.25, True, "{:.2f} ×")
        judge(case, "gaps between steps below 2%", ours.get("step_gap"), 0.02, False, "{:.2%}")
    return told


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if not ours or not theirs else ours / theirs


def latest(records: Iterable[Record], key: Callable[[Record], Any]) -> list[Record]:
    """The last record of each key, in the order in which keys first came."""
    kept: dict[Any, Record] = {}
    for one in records:
        kept[key(one)] = one
    return list(kept.values())
