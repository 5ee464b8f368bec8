"""The optimizer's kernels in Triton's intermediate representation, as JSON: `python -m tests.kernels.compiled_updates`.

A program, because the process that runs the tests interprets kernels and cannot compile them.
"""

from __future__ import annotations

import json

import torch

from kernels.adamw import adamw
from kernels.grad_norm import grad_norm
from kernels.offline.compile import compile_launch
from kernels.offline.record import record


def update() -> None:
    """One launch of each kernel; of AdamW those with the most kinds of pointers, of params and of halves."""
    params, first, second = ([torch.empty(5000, device="meta")] for _ in range(3))
    grads, rounded = ([torch.empty(5000, dtype=torch.bfloat16, device="meta")] for _ in range(2))
    remainders = [torch.empty(5000, dtype=torch.int16, device="meta")]
    scalars = {name: torch.empty((), device="meta") for name in ("lr", "step", "clip_scale", "should_skip")}
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **scalars}
    adamw(params, grads, first, second, shadows=rounded, rounding_seed=1, **options)
    adamw(rounded, grads, first, second, remainders=remainders, **options)
    grad_norm(params)
    grad_norm(grads)


if __name__ == "__main__":
    print(json.dumps([compile_launch(launch, 90).ttir for launch in record(update, 90)]))
