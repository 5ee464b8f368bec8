"""The audit as tables: for a terminal, and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from kernels.offline.audit import Audit, Row
from kernels.offline.floors import DATA_SHEETS, Floor

_KERNEL_HEAD = (
    "kernel", "launched by", "dtype", "chip", "launch", "registers", "spilled", "shared", "load", "store", "products",
)  # fmt: skip
_FLOOR_HEAD = ("op", "pass", "shape", "dtype", "MB", "GFLOP", *(f"{sheet.name}, µs" for sheet in DATA_SHEETS))

EXPLANATION = """\
Registers and spilled bytes are a thread's, shared memory is a program's in bytes, load and store are the bytes of
the widest access. No GPU took part: these are properties of the machine code, not measurements."""

FLOORS_EXPLANATION = """\
What no version can beat: the bytes that must move at the bandwidth, or the operations at the 16-bit peak, of NVIDIA's
data sheets. A bound, not a measurement."""


def text(audit: Audit, floors: Sequence[Floor]) -> str:
    """For a terminal: one table an op, the floors, then what fails."""
    parts = []
    for op, rows in _by_op(audit):
        parts.append(f"{op}\n" + _aligned(_KERNEL_HEAD, [_kernel_cells(row) for row in rows]))
    parts.append(EXPLANATION)
    parts.append(_aligned(_FLOOR_HEAD, [_floor_cells(floor) for floor in floors]))
    parts.append(FLOORS_EXPLANATION)
    parts += ["\n".join(_tally(audit)), "\n".join(audit.failures)]
    return "\n\n".join(part for part in parts if part)


def page(audit: Audit, floors: Sequence[Floor], date: str, command: str, versions: str) -> str:
    """The same in Markdown."""
    parts = [
        "# Kernels as compiled",
        f"`{command}`, {date}, {versions}.",
        EXPLANATION,
    ]
    for op, rows in _by_op(audit):
        parts += [f"## {op}", _piped(_KERNEL_HEAD, [_kernel_cells(row) for row in rows])]
    parts += ["## Limits", "\n".join(f"- {line}" for line in [*_tally(audit), *audit.failures])]
    parts += ["## Lower bounds", FLOORS_EXPLANATION, _piped(_FLOOR_HEAD, [_floor_cells(floor) for floor in floors])]
    return "\n\n".join(parts) + "\n"


def _by_op(audit: Audit) -> Iterator[tuple[str, list[Row]]]:
    """What ops dispatch, in the order of cases, both chips of a form under each other."""
    dispatched = [row for row in audit.rows if row.is_dispatched]
    order = {op: place for place, op in enumerate(dict.fromkeys(row.op for row in dispatched))}
    kernels = {name: place for place, name in enumerate(dict.fromkeys(row.kernel for row in dispatched))}
    dispatched.sort(key=lambda row: (order[row.op], kernels[row.kernel]))
    for op, rows in groupby(dispatched, key=lambda row: row.op):
        yield op, list(rows)


def _kernel_cells(row: Row) -> tuple[str, ...]:
    figures = (row.registers, row.spilled, row.shared, row.loads, row.stores)
    cells = row.kernel.removeprefix("_"), f"{row.stage}, {row.case}", _short(row.dtype), f"sm_{row.arch}", row.options
    return *cells, *map(str, figures), row.products or "-"


def _floor_cells(floor: Floor) -> tuple[str, ...]:
    amounts = f"{floor.bytes / 1e6:,.1f}", f"{floor.flops / 1e9:,.1f}" if floor.flops else "-"
    times = (f"{time:,.1f}" for time in floor.microseconds)
    return floor.op, floor.stage, floor.case, _short(floor.dtype), *amounts, *times


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def _tally(audit: Audit) -> Iterator[str]:
    dispatched = [row for row in audit.rows if row.is_dispatched]
    names = {row.kernel for row in dispatched}
    yield f"{len(names)} kernels in {len(dispatched)} forms that ops launch; {len(audit.failures)} failures."
    candidates = len(audit.rows) - len(dispatched)
    yield f"{candidates} more forms that the tuner may try; {len(audit.dropped)} of them break a limit and are dropped."


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(_cells(row, widths)).rstrip() for row in (head, *rows))


def _piped(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _cells(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Numbers to the right."""
    for cell, width in zip(row, widths, strict=True):
        is_number = cell.replace(",", "").replace(".", "").isdigit() or cell == "-"
        yield cell.rjust(width) if is_number else cell.ljust(width)
