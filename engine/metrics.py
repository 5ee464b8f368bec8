"""Speed, utilisation and memory of a run."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

# Dense bf16 peaks in FLOP/s, from the makers' data sheets. H800 and A800 compute as H100 and A100.
PEAKS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
}

MFU_CONVENTION = "PaLM: 6 x matrix parameters + 12 x layers x width x context FLOPs a token, over the bf16 peak"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known GPU; None for a CPU or an unknown one, whose utilisation is not stated."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = [known for known in PEAKS if known in name]
    return PEAKS[max(found, key=len)] if found else None


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on a GPU, resident in a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Speed:
    """Speed of steps. mfu is None where the peak is not known."""

    tokens_per_second: float
    mfu: float | None
    data_wait_share: float
    seconds_a_step: float


class Speedometer:
    """Tokens read and time, all ranks together, one lap a step; evaluation and saving do not count.

    Args:
        flops_per_token: of the model at the run's context, forward and backward.
        peak: FLOP/s of one device, or None.
    """

    # The average follows the last twenty steps or so; the first step, which warms everything up, is left out.
    RATE = 0.05

    def __init__(self, flops_per_token: float, peak: float | None, world: int) -> None:
        self._flops_per_token, self._peak, self._world = flops_per_token, peak, world
        self._average: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self._laps = 0
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last lap."""
        self._begin = time.perf_counter()

    def lap(self, tokens: int, data_wait: float, finished_at: float) -> Speed:
        """Speed of one step.

        Args:
            tokens: of all ranks, trained or not, without padding.
            data_wait: seconds this rank waited for data.
            finished_at: `time.perf_counter()` at its end; its numbers are read later.
        """
        lap = (float(tokens), max(finished_at - self._begin, 1e-9), data_wait)
        self._begin = finished_at
        rate = max(self.RATE, 1 / max(1, self._laps))
        self._laps += 1
        mixed = [(1 - rate) * old + rate * new for old, new in zip(self._average, lap, strict=True)]
        self._average = (mixed[0], mixed[1], mixed[2])
        return self._speed(*lap)

    def average(self) -> Speed:
        """Speed over recent steps; needs one lap."""
        assert self._laps
        return self._speed(*self._average)

    def _speed(self, tokens: float, seconds: float, data_wait: float) -> Speed:
        rate = tokens / seconds
        mfu = rate * self._flops_per_token / (self._peak * self._world) if self._peak else None
        return Speed(rate, mfu, data_wait / seconds, seconds)
