"""The audit as tables: for a terminal, and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from kernels.offline.audit import Audit, Row
from kernels.offline.floors import DATA_SHEETS, Floor

_KERNEL_HEAD = (
    "kernel", "launched by", "dtype", "chip", "launch", "registers", "spilled", "shared", "load", "store", "products",
)  # fmt: skip
_FLOOR_HEAD = ("op", "pass", "shape", "dtype", "MB", "GFLOP", *(f"{sheet.name}, µs" for sheet in DATA_SHEETS))

EXPLANATION = """\
Registers and spilled bytes are a thread's, shared memory is a program's in bytes, load and store are the bytes of
the widest access; `32/34` is 32 on the first chip and 34 on the second. No GPU took part: these are properties of
the machine code, not measurements."""

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


def page(audit: Audit, floors: Sequence[Floor], facts: Mapping[str, str]) -> str:
    """The same in Markdown. facts: what the figures depend on, by name."""
    parts = ["# Kernels as compiled", ", ".join(f"{name} {fact}" for name, fact in facts.items()) + ".", EXPLANATION]
    for op, rows in _by_op(audit):
        parts += [f"## {op}", _piped(_KERNEL_HEAD, [_kernel_cells(row) for row in rows])]
    parts += ["## Limits", "\n".join(f"- {line}" for line in [*_tally(audit), *audit.failures])]
    parts += ["## Lower bounds", FLOORS_EXPLANATION, _piped(_FLOOR_HEAD, [_floor_cells(floor) for floor in floors])]
    return "\n\n".join(parts) + "\n"


def _by_op(audit: Audit) -> Iterator[tuple[str, list[tuple[Row, ...]]]]:
    """What ops dispatch, in the order of cases, forms that both chips share together."""
    forms: dict[tuple[str, ...], list[Row]] = {}
    for row in audit.rows:
        if row.is_dispatched:
            forms.setdefault((row.op, row.kernel, row.stage, row.case, row.dtype, row.options), []).append(row)
    ops = {op: place for place, (op, *_) in reversed(list(enumerate(forms)))}
    kernels = {kernel: place for place, (_, kernel, *_) in reversed(list(enumerate(forms)))}
    order = sorted(forms, key=lambda form: (ops[form[0]], kernels[form[1]]))
    for op, names in groupby(order, key=lambda form: form[0]):
        yield op, [tuple(forms[name]) for name in names]


def _kernel_cells(rows: tuple[Row, ...]) -> tuple[str, ...]:
    """Figures that differ between chips as `32/34`."""
    one = rows[0]
    figures = zip(
        *((x.registers, x.spilled, x.shared, x.loads, x.stores, x.products or "-") for x in rows), strict=True
    )
    chips = ", ".join(f"sm_{row.arch}" for row in rows)
    cells = one.kernel.removeprefix("_"), f"{one.stage}, {one.case}", _short(one.dtype), chips, one.options
    return *cells, *("/".join(dict.fromkeys(map(str, figure))) for figure in figures)


def _floor_cells(floor: Floor) -> tuple[str, ...]:
    amounts = f"{floor.bytes / 1e6:,.1f}", f"{floor.flops / 1e9:,.1f}" if floor.flops else "-"
    times = (f"{time:,.1f}" for time in floor.microseconds)
    return floor.op, floor.stage, floor.case, _short(floor.dtype), *amounts, *times


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def _tally(audit: Audit) -> Iterator[str]:
    dispatched = [row for row in audit.rows if row.is_dispatched]
    names = {row.kernel for row in dispatched}
    yield f"Kernels that ops launch: {len(names)}, in {len(dispatched)} forms; failures: {len(audit.failures)}."
    candidates = len(audit.rows) - len(dispatched)
    yield f"Forms that only the tuner may try: {candidates}; dropped, because they break a limit: {len(audit.dropped)}."


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(_cells(row, widths)).rstrip() for row in (head, *rows))


def _piped(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _cells(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Numbers to the right."""
    for cell, width in zip(row, widths, strict=True):
        is_number = all(character in "0123456789,./-" for character in cell)
        yield cell.rjust(width) if is_number else cell.ljust(width)
