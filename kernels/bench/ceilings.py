"""What the machine can do at all: the rates that every other figure is a per cent of.

    copy       bytes read plus bytes written a second, by device-to-device copies of several sizes
    product    floating-point operations a second, by square matrix products of random bf16 numbers

Both are the best median of their sizes: a rate that was really reached here, not one from a data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.bench.clock import Clock, Round, Times, race

COPY_BYTES = tuple(1 << power for power in (28, 30, 31, 32))  # 0.25 to 4 GiB, all far beyond the cache
PRODUCT_WIDTHS = (4096, 8192, 16384)


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes a second. product: bf16 operations a second."""

    copy: float
    product: float

    def floor(self, moved: float, operations: float) -> float:
        """Milliseconds that no call can beat which moves so many bytes and does so many operations."""
        return 1e3 * max(moved / self.copy, operations / self.product)


def measure_ceilings(
    clock: Clock,
    device: torch.device,
    copy_bytes: tuple[int, ...] = COPY_BYTES,
    product_widths: tuple[int, ...] = PRODUCT_WIDTHS,
) -> tuple[Ceilings, list[str]]:
    """The ceilings, and a line on every size that was tried."""
    lines, copies, products = [], [], []
    for size in copy_bytes:
        source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times = _time(clock, lambda target=target, source=source: target.copy_(source))  # type: ignore[misc]
        copies.append(2 * size / times.median * 1e3)
        lines.append(f"copy of {size / 2**30:g} GiB: {copies[-1] / 1e12:.3f} TB/s")
        del source, target
    for width in product_widths:
        a, b = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
        out = torch.empty_like(a)
        times = _time(clock, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
        products.append(2 * width**3 / times.median * 1e3)
        lines.append(f"bf16 product of {width} x {width}: {products[-1] / 1e12:.1f} TFLOP/s")
    return Ceilings(max(copies), max(products)), lines


def _time(clock: Clock, call) -> Times:
    return race(clock, {"it": Round(call, 1)})["it"]
