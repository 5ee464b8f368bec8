"""Speed, utilisation and memory of a run."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

# Dense bf16 peaks in FLOP/s, from the makers' data sheets. H800 and A800 compute as H100 and A100.
_PEAKS = {
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
    found = [known for known in _PEAKS if known in name]
    return _PEAKS[max(found, key=len)] if found else None


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on a GPU, resident in a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Speed:
    """Since the last look. mfu is None where the peak is not known."""

    tokens_per_second: float
    mfu: float | None
    data_wait_share: float
    seconds_a_step: float


class Speedometer:
    """Counts real tokens (without tails) and time, all ranks together; evaluation and saving do not count.

    Args:
        flops_per_token: of the model at the run's context, forward and backward.
        peak: FLOP/s of one device, or None.
    """

    def __init__(self, flops_per_token: float, peak: float | None, world: int) -> None:
        self._flops_per_token, self._peak, self._world = flops_per_token, peak, world
        self._average_step: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self._tokens = self._steps = 0
        self._data_wait = 0.0
        self._begin = time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Leave out time in which no training was meant to happen."""
        self._begin += seconds

    def count(self, tokens: int, data_wait: float) -> None:
        """One more step: its real tokens over all ranks, and how long this rank waited for data, in seconds."""
        self._tokens += tokens
        self._data_wait += data_wait
        self._steps += 1

    def look(self) -> Speed:
        """Speed since the last look."""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        rate = self._tokens / seconds
        mfu = rate * self._flops_per_token / (self._peak * self._world) if self._peak else None
        speed = Speed(rate, mfu, self._data_wait / seconds, seconds / max(1, self._steps))
        self._average_step = speed.seconds_a_step
        self.restart()
        return speed

    def remaining_seconds(self, steps: int) -> float | None:
        """Time that `steps` more will take at the last interval's pace."""
        return None if self._average_step is None else steps * self._average_step
