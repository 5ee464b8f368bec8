"""Findings in words and tables: lines for a terminal, a page in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kernels.bench.host import BUDGET, HostRow
from kernels.bench.results import Findings
from kernels.bench.workload import PASSES, Row

_WIDTHS = (22, 38, 9, 9, 26, 14, 8, 10, 24, 7)
_HEAD = ("op", "shape", "dtype", "pass", "ms (p20–p80)", "rate", "% ceil.", "extra MiB", "best peer", "ratio", "target")


def ceiling_text(findings: Findings) -> str:
    facts = "\n".join(f"{name}: {value}" for name, value in findings.machine.items())
    absent = "\n".join(f"not installed: {peer} ({reason})" for peer, reason in findings.missing.items())
    return "\n".join(part for part in (facts, *findings.ceiling_lines, _ceilings(findings), absent) if part)


def _ceilings(findings: Findings) -> str:
    copy, product = findings.ceilings.copy / 1e12, findings.ceilings.product / 1e12
    return f"ceilings: copy {copy:.3g} TB/s, bf16 product {product:.4g} TFLOP/s"


def head_text() -> str:
    return _line(_HEAD)


def row_text(findings: Findings, row: Row) -> str:
    """A line on ours; of others only that they failed."""
    if row.role == "ours":
        return _line(_cells(findings, row))
    return f"  {row.contender} on {row.op} {row.shape}, {row.stage}: {row.note}" if row.note else ""


def host_text(rows: Sequence[HostRow]) -> str:
    lines = [f"host time a call beyond its launches, µs; budget {BUDGET:g}"]
    lines.append(f"{'op':<22}{'launches':>9}{'inference':>11}{'forward':>10}{'backward':>10}")
    for row in rows:
        figures = "".join(f"{'' if x is None else f'{x:.1f}':>10}" for x in (row.forward, row.backward))
        lines.append(f"{row.op:<22}{row.launches:>9}{row.inference:>11.1f}{figures}{'' if row.is_met else '  over'}")
    return "\n".join(lines)


def summary_text(findings: Findings) -> str:
    return "\n".join(_summary(findings))


def _summary(findings: Findings) -> Iterator[str]:
    judged = [one for one in findings.verdicts if one.verdict != "not measured"]
    met = sum(one.verdict == "met" for one in judged)
    yield f"Targets: {met} of {len(judged)} met, {len(findings.verdicts) - len(judged)} not measured."
    for one in findings.verdicts:
        if one.verdict != "met":
            found = "" if one.value is None else f", found {one.value:.4g}"
            yield f"{one.verdict}: {one.op} {one.shape} {one.dtype}, {one.stage}: {one.target}{found}"
    yield findings.liger_verdict()
    for row in findings.wrong:
        yield f"WRONG: {row.op} {row.shape} {row.dtype}, {row.stage}, {row.contender}: {row.note}"
    if findings.unmeasured:
        yield f"The time was up: {len(findings.unmeasured)} not measured: {', '.join(findings.unmeasured)}."


def page(findings: Findings) -> str:
    """Markdown."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in findings.machine.items())
    parts = [
        f"# Kernels on {findings.machine['device']}",
        "What the columns mean, and how to repeat this: [README](README.md).",
        f"| | |\n|---|---|\n{facts}",
        "## Ceilings, measured in this run",
        "\n".join(f"- {line}" for line in [*findings.ceiling_lines, _ceilings(findings)]),
        "## Summary",
        "\n".join(f"- {line}" for line in _summary(findings)),
        "## Ours",
        piped(_HEAD, [_cells(findings, row) for row in findings.ours()]),
        "## Everyone, in milliseconds",
        _everyone(findings),
        "## Host time a call beyond its launches",
        _host(findings.host),
    ]
    absent = [f"- {peer}: not installed ({reason})" for peer, reason in findings.missing.items()]
    absent += [f"- {row.contender} on {row.op} {row.shape}, {row.stage}: {row.note}" for row in findings.failed_peers]
    if absent:
        parts += ["## Peers that took no part", "\n".join(absent)]
    return "\n\n".join(parts) + "\n"


def _cells(findings: Findings, row: Row) -> tuple[str, ...]:
    peer = findings.best_peer(row)
    ratio = findings.speed_over(row, peer)
    best = "" if peer is None or peer.times is None else f"{peer.contender} {peer.times.median:.4g}"
    return (
        row.op,
        row.shape,
        row.dtype,
        row.stage,
        times_text(row),
        rate_text(row),
        "" if row.percent is None else f"{row.percent:.1f}",
        "" if row.extra is None else f"{row.extra / 2**20:.1f}",
        best,
        "" if ratio is None else f"{ratio:.2f}",
        findings.verdict_of(row),
    )


def times_text(row: Row) -> str:
    """Median, 20th and 80th percentile; or why there are none."""
    if row.times is None:
        return row.note or "not measured"
    return f"{row.times.median:.4g} ({row.times.p20:.4g}–{row.times.p80:.4g})"


def rate_text(row: Row) -> str:
    if row.rate is None:
        return ""
    return f"{row.rate / 1e12:.1f} TFLOP/s" if row.is_bound_by_products else f"{row.rate / 1e9:.0f} GB/s"


def _everyone(findings: Findings) -> str:
    """A line for every job, a column for every contender."""
    names = list(dict.fromkeys(row.contender for row in findings.rows))
    jobs = dict.fromkeys((row.op, row.shape, row.dtype, row.stage) for row in findings.rows)
    times = {
        (row.op, row.shape, row.dtype, row.stage, row.contender): f"{row.times.median:.4g}"
        for row in findings.rows
        if row.times is not None
    }
    order = {op: place for place, op in enumerate(dict.fromkeys(row.op for row in findings.rows))}
    ordered = sorted(jobs, key=lambda job: (order[job[0]], list(jobs).index(job) // len(PASSES)))
    return piped(
        ("op", "shape", "dtype", "pass", *names),
        [(*job, *(times.get((*job, name), "") for name in names)) for job in ordered],
    )


def _host(rows: Sequence[HostRow]) -> str:
    head = ("op", "launches", "inference, µs", "forward, µs", "backward, µs")
    cells = [
        (
            row.op,
            str(row.launches),
            *("" if x is None else f"{x:.1f}" for x in (row.inference, row.forward, row.backward)),
        )
        for row in rows
    ]
    return piped(head, cells)


def _line(cells: Sequence[str]) -> str:
    *padded, last = cells
    return " ".join([*(f"{cell:<{width}}" for cell, width in zip(padded, _WIDTHS, strict=True)), last]).rstrip()


def piped(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
