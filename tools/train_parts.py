"""A profiler's trace to the time that each part of a training step takes.

On a GPU the parts are made of kernels, and what is left of a step is gaps, in which the device waits for the host. On a
CPU they are made of the operators' own time, and the gaps are Python. A kernel is told by its own name and by that of
the operator that launched it, with the shapes of its arguments: a product in which a side is as long as the vocabulary
belongs to the head.
"""

from __future__ import annotations

import bisect
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("attention", "products", "head", "norm, activation, rotary", "optimizer", "other kernels")
ATTENTION, PRODUCTS, HEAD, POINTWISE, OPTIMIZER, OTHER = PARTS
STEP = "one optimizer step"

_OPTIMIZER = re.compile(r"(?i)adam|^optimizer$|sum_of_squares|(?<!un)clip_grad")
_ATTENTION = re.compile(r"(?i)attention|attn|flash_|fmha|sdpa|_scaled_dot_product|\b_schedule_kernel")
_HEAD = re.compile(r"(?i)cross_?entropy|linear_logprob|log_?softmax|nll_loss|logsumexp|log_sum_exp")
_PRODUCT = re.compile(
    r"(?i)gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|matmul|scaled_mm|low_rank"
    r"|aten::(mm|addmm|bmm|mv|linear|_scaled_mm)(\.out)?$|mkldnn|mkl_linear"
)
_MOVING = re.compile(
    r"(?i)copy|memcpy|memset|clone|fill|zero|embedding|index|gather|scatter|nccl|fsdp"
    r"|::cat|split_with_sizes|AccumulateGrad|aten::(to|contiguous|empty|reshape|detach|view|t|transpose)"
)
_FUSED = re.compile(r"(?i)rms_?norm|swiglu|silu|rotary|rope|^triton_(poi|red|per|tem)_")
_POINTWISE = re.compile(
    r"(?i)elementwise|reduce_kernel|sum_rows"
    r"|aten::(mul|add|sub|div|neg|pow|mean|sum|rsqrt|cos|sin|sigmoid|where|square|sqrt)"
)
_FREE = re.compile(r"^(autograd::engine|aten::(as_strided|view|expand|detach|empty))|^detach$")


def part_of(kernel: str, operators: tuple[str, ...] = (), shapes: Sequence[list[int]] = (), vocabulary: int = 0) -> str:
    """The part that a kernel belongs to, one of PARTS.

    Args:
        kernel: its name; of a CPU's operator, that.
        operators: what launched it, and whatever that was called from, from the outside in.
        shapes: of the arguments of the last of them.
        vocabulary: rows of the head.
    """
    inner = operators[-1] if operators else ""
    if any(map(_OPTIMIZER.search, (kernel, *operators))):
        return OPTIMIZER
    if any(map(_HEAD.search, (kernel, *operators))):
        return HEAD
    if any(map(_ATTENTION.search, (kernel, *operators))):
        return ATTENTION
    if _PRODUCT.search(kernel) or _PRODUCT.search(inner):
        return HEAD if any(vocabulary in shape for shape in shapes) else PRODUCTS
    # Logits end in the vocabulary; the embedding and the head's weight begin with it.
    if any(shape[-1:] == [vocabulary] for shape in shapes):
        return HEAD
    if _FUSED.search(kernel):
        return POINTWISE
    if any(map(_MOVING.search, (kernel, *operators))):
        return OTHER
    return POINTWISE if any(map(_POINTWISE.search, (kernel, inner))) or any(map(_FUSED.search, operators)) else OTHER


class Parts(NamedTuple):
    """Of one step, in seconds.

    seconds: of each part.
    busy: while the device did anything; kernels side by side count once.
    gap: between a step's last kernel and the first one of the next step; None where that was not traced.
    largest: the kernels that took most: (name, part, seconds).
    """

    seconds: dict[str, float]
    busy: float
    gap: float | None
    largest: list[tuple[str, str, float]]


def trace(step: Callable[[], None], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Events of so many steps, in Chrome's trace format; times are microseconds."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def parts(events: list[dict[str, Any]], steps: int, vocabulary: int) -> Parts:
    """What a trace of so many steps says of one."""
    operators = [event for event in events if event["cat"] in ("cpu_op", "user_annotation")]
    callers, own = _nested(operators)
    kernels = [event for event in events if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    names: dict[tuple[str, str], float] = defaultdict(float)
    if kernels:
        launched_by = {event["args"]["External id"]: place for place, event in enumerate(operators) if _id(event)}
        for kernel in kernels:
            place = launched_by.get(_id(kernel))
            shapes = [] if place is None else _shapes(operators[place])
            part = part_of(kernel["name"], () if place is None else callers[place], shapes, vocabulary)
            seconds[part] += kernel["dur"] / 1e6
            names[kernel["name"], part] += kernel["dur"] / 1e6
        busy, gap = _covered(kernels) / 1e6, _gap_between_steps(events, kernels)
    else:
        for operator, path, duration in zip(operators, callers, own, strict=True):
            if operator["name"] != STEP and not _FREE.search(operator["name"]):
                part = part_of(operator["name"], path, _shapes(operator), vocabulary)
                seconds[part] += duration / 1e6
                names[operator["name"], part] += duration / 1e6
        busy, gap = sum(seconds.values()), None
    largest = [
        (name[:120], part, time / steps) for (name, part), time in sorted(names.items(), key=lambda item: -item[1])[:12]
    ]
    return Parts({part: seconds[part] / steps for part in PARTS}, busy / steps, gap, largest)


def _id(event: dict[str, Any]) -> int | None:
    return event.get("args", {}).get("External id")


def _shapes(event: dict[str, Any]) -> list[list[int]]:
    """Shapes of an operator's tensors; those in lists are left out."""
    found = event.get("args", {}).get("Input Dims", [])
    return [shape for shape in found if all(isinstance(side, int) for side in shape)]


def _nested(operators: list[dict[str, Any]]) -> tuple[list[tuple[str, ...]], list[float]]:
    """Of each operator the names from the outermost one of its thread down to itself, and its own time without that of
    the operators within."""
    paths: list[tuple[str, ...]] = [()] * len(operators)
    own = [event["dur"] for event in operators]
    threads: dict[Any, list[int]] = defaultdict(list)
    for place, event in enumerate(operators):
        threads[event["tid"]].append(place)
    for places in threads.values():
        places.sort(key=lambda place: (operators[place]["ts"], -operators[place]["dur"]))
        open_ones: list[int] = []
        for place in places:
            event = operators[place]
            while open_ones and event["ts"] >= _end(operators[open_ones[-1]]):
                open_ones.pop()
            outer = paths[open_ones[-1]] if open_ones else ()
            paths[place] = (*outer, event["name"])
            if open_ones:
                own[open_ones[-1]] -= event["dur"]
            open_ones.append(place)
    return paths, own


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _covered(events: list[dict[str, Any]]) -> float:
    """Microseconds in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        total += max(0.0, _end(event) - max(until, event["ts"]))
        until = max(until, _end(event))
    return total


def _gap_between_steps(events: list[dict[str, Any]], kernels: list[dict[str, Any]]) -> float | None:
    """Seconds from a step's last kernel to the next one's first, on the average; a kernel belongs to the step that was
    at work on the host when it was launched."""
    begins = sorted(event["ts"] for event in events if event["name"] == STEP and event["cat"] == "user_annotation")
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for kernel in kernels:
        launched = launches.get(kernel.get("args", {}).get("correlation"))
        if launched is not None:
            step = bisect.bisect_right(begins, launched) - 1
            first[step] = min(first.get(step, kernel["ts"]), kernel["ts"])
            last[step] = max(last.get(step, _end(kernel)), _end(kernel))
    gaps = [max(0.0, first[step + 1] - last[step]) for step in range(len(begins) - 1) if {step, step + 1} <= set(first)]
    return sum(gaps) / len(gaps) / 1e6 if gaps else None
