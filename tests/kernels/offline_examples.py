"""Kernels that are right, and kernels that break one limit each: what the audit must let pass, and what it must find.

Run as a program, in a process that does not interpret kernels, it audits them all and leaves the result as JSON:
`python -m tests.kernels.offline_examples FILE`. A kernel's docstring is what the audit has to say of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.backend import launch
from kernels.offline.audit import ON_TENSOR_CORES, Case, audit_cases

ROWS, COLUMNS = 8192, 1024


@triton.jit
def copy_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """right: 64 bits before the product"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    tl.store(y_ptr + row * stride + column, tl.load(x_ptr + row * stride + column))


@triton.jit
def columns_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """right: columns of one row in 32 bits, up to a multiple of the block, as `cdiv(n, b) * b`"""
    row_ptr = x_ptr + tl.program_id(0).to(tl.int64) * stride
    for start in range(0, tl.cdiv(stride, BLOCK) * BLOCK, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + column, tl.load(row_ptr + column, mask=column < stride), mask=column < stride)


@triton.jit
def packed_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """right: starts of documents widened before the product, pages by division, and a product that is said to fit"""
    document = tl.program_id(0)
    start = tl.load(cu_ptr + document).to(tl.int64)
    length = tl.load(cu_ptr + document + 1) - start
    for tile in range(0, length, 64):
        page = tl.load(cu_ptr + tile // 64).to(tl.int64)
        place = tl.arange(0, 64)[:, None] * stride  # fits 32 bits: strides are below 2^20
        place = page * stride + place + tl.arange(0, 32)[None, :]
        tl.store(y_ptr + start * stride + place, tl.load(x_ptr + place))


@triton.jit
def narrow_row_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """32-bit product"""
    place = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place))


@triton.jit
def late_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """32-bit product"""
    place = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    tl.store(y_ptr + place, tl.load(x_ptr + place))


@triton.jit
def cutting_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """cut to 32 bits"""
    place = (tl.program_id(0).to(tl.int64) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place))


@triton.jit
def narrow_document_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """32-bit product"""
    start = tl.load(cu_ptr + tl.program_id(0))
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + start * stride + tl.arange(0, BLOCK)))


@triton.jit
def walking_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """32-bit product"""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + row * BLOCK + tl.arange(0, BLOCK)))


@triton.jit
def adding_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """32-bit sum that grows"""
    place = tl.arange(0, BLOCK)
    for _ in range(rows):
        tl.store(y_ptr + place, tl.load(x_ptr + place))
        place += stride


@triton.jit
def branching_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """32-bit product"""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    if row < rows // 2:
        place = row.to(tl.int64) * BLOCK
    else:
        place = (row * BLOCK).to(tl.int64)
    while place > BLOCK:
        tl.store(y_ptr + place + column, tl.load(x_ptr + place + column))
        place -= BLOCK


@triton.jit(noinline=True)
def _place_of(row, stride):
    return row * stride


@triton.jit
def calling_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """32-bit product"""
    place = tl.multiple_of(_place_of(tl.program_id(0), stride), 16)
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + place + tl.arange(0, BLOCK)))


@triton.jit
def tile_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """32-bit product"""
    place = tl.arange(0, 16)[:, None] * stride + tl.arange(0, 128)[None, :]
    tl.store(y_ptr + place, tl.load(x_ptr + place))


@triton.jit
def spilling_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """spills"""
    column = tl.arange(0, 32 * BLOCK)
    x = tl.load(x_ptr + column).to(tl.float32)
    tl.store(y_ptr + column, x * tl.sum(x * x))


@triton.jit
def crooked_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """of the bytes it loads"""
    column = tl.arange(0, BLOCK)
    tl.store(y_ptr + column, tl.load(x_ptr + column + 1))


@triton.jit
def scattering_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """of the bytes it stores"""
    column = tl.arange(0, BLOCK)
    tl.store(y_ptr + 2 * column, tl.load(x_ptr + column))


@triton.jit
def product_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """right: 64 rows, which both chips multiply on their tensor cores"""
    _multiply(x_ptr, y_ptr, 64, 64, 128)


@triton.jit
def low_product_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """its products are mma"""
    _multiply(x_ptr, y_ptr, 16, 64, 128)


@triton.jit
def roomy_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """shared memory"""
    _multiply(x_ptr, y_ptr, 64, 64, 1024)


@triton.jit
def slow_product_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """no kernel uses"""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + row * 64 + column)
    tl.store(y_ptr + row * 64 + column, tl.sum(x[:, None, :] * x[None, :, :], axis=1))


@triton.jit
def wrong_kernel(x_ptr, y_ptr, cu_ptr, rows, stride, BLOCK: tl.constexpr):
    """does not compile"""
    tl.store(y_ptr, tl.arange(0, BLOCK - 1))


@triton.jit
def _multiply(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(x_ptr + row * K + inner[None, :])
    b = tl.load(x_ptr + inner[:, None] * N + column)
    tl.store(y_ptr + row * N + column, tl.dot(a, b))


PLAIN = (
    copy_kernel, columns_kernel, packed_kernel, narrow_row_kernel, late_kernel, cutting_kernel, narrow_document_kernel,
    walking_kernel, adding_kernel, branching_kernel, calling_kernel, tile_kernel, spilling_kernel, crooked_kernel,
    scattering_kernel, wrong_kernel,
)  # fmt: skip
PRODUCTS = (product_kernel, low_product_kernel, roomy_kernel, slow_product_kernel)


def _nothing() -> None:
    """Launches no kernel."""


def cases() -> Iterator[Case]:
    def call(kernel: Any, *tensors: torch.Tensor) -> None:
        launch(kernel, (ROWS,), *tensors, ROWS, COLUMNS, BLOCK=COLUMNS, num_warps=4, num_stages=3)

    def arguments() -> tuple[torch.Tensor, ...]:
        x, y = (torch.empty(ROWS, COLUMNS, dtype=torch.float16, device="meta") for _ in range(2))
        return x, y, torch.empty(ROWS + 1, dtype=torch.int32, device="meta")

    def case(kernel: Any, call: Callable[..., Any], **keywords: Any) -> Case:
        return Case(kernel.__name__, "", torch.float16, COLUMNS, call, arguments, **keywords)

    for kernel in PLAIN:
        yield case(kernel, partial(call, kernel))
    for kernel in PRODUCTS:
        yield case(kernel, partial(call, kernel), products=ON_TENSOR_CORES)
    yield case(_nothing, lambda *_: None)


if __name__ == "__main__":
    audit, _ = audit_cases(cases())
    meant = {kernel.__name__: kernel.__doc__ for kernel in (*PLAIN, *PRODUCTS)}
    meant["_nothing"] = "launches no kernel"
    found: dict[str, list[str]] = {name: [] for name in meant}
    for row in audit.rows:
        found[row.kernel] += row.broken
    for line in audit.silent:
        found[line.split(":")[0]].append(line)
    Path(sys.argv[1]).write_text(json.dumps({"meant": meant, "found": found}), encoding="utf-8")
