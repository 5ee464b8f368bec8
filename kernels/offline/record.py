"""What an op would launch, found by calling it on tensors without memory.

Launch configurations, strides and divisibility are those of a real call, because the op's own code makes them: what
is audited is what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import Chip, observed_launches

# Multiprocessors of an A100 and of an H100 or H200 (SXM).
CHIPS = {80: Chip(80, 108), 90: Chip(90, 132)}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton would specialise it for one call.

    signature: type of every parameter, by name; `constexpr` for what is fixed at compile time.
    constants: values of those.
    aligned: positions of the pointers and numbers that are multiples of 16.
    options: num_warps, num_stages and the like.
    """

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def has_aligned_pointers(self) -> bool:
        """Whether every pointer is, so that 16-byte loads are possible."""
        return all(i in self.aligned for i, (_, kind) in enumerate(self.signature) if kind.startswith("*"))


def record(call: Callable[[], Any], arch: int) -> list[Launch]:
    """Launches of a call, in order, without running any.

    Args:
        call: calls an op, and its backward if it is wanted, on tensors of the meta device.
        arch: 80 or 90.
    """
    launches: list[Launch] = []

    def observe(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        launches.append(_specialise(kernel, grid, args, options))

    with observed_launches(observe, CHIPS[arch]):
        call()
    return launches


def _specialise(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """By Triton's own rules: None and 1 become constants, multiples of 16 are known to be so."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    values = dict(zip(kernel.arg_names, args, strict=False))
    assert len(values) == len(args), f"{kernel.__name__} takes fewer arguments than {len(args)}"
    values |= {name: options[name] for name in kernel.arg_names if name in options}
    assert set(values) == set(kernel.arg_names), f"{kernel.__name__}: missing {set(kernel.arg_names) - set(values)}"
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = "constexpr" if parameter.is_constexpr or value is None else _kind(value)
        if kind in ("i32", "i64") and value == 1 and not parameter.do_not_specialize:
            kind = "constexpr"
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append((parameter.name, value))
        elif _is_multiple_of_16(value) and not parameter.do_not_specialize:
            aligned.append(index)
    left = tuple(sorted((name, value) for name, value in options.items() if name not in values))
    return Launch(kernel, grid, tuple(signature), tuple(constants), tuple(aligned), left)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), f"a kernel cannot take {value!r}"
    return "fp32"


def _is_multiple_of_16(value: Any) -> bool:
    if isinstance(value, Tensor):
        address = value.data_ptr() if value.device.type != "meta" else value.storage_offset() * value.element_size()
        return address % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0
