"""A report as Markdown: the tables and notes, without plots and samples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from evals import report_tables as tables
from evals.published import Column, Published
from evals.report_facts import Comparison, Report, Section, Wins
from evals.report_format import (
    KINDS,
    bounds,
    heading,
    number,
    probability,
    signed,
    title,
    visible,
)
from evals.task import Metric

_ACTS = re.compile(r"([\\`*_\[\]<>|~&$]|^[#+-])")


def render(report: Report, published: Published) -> str:
    """The report; no line of it is longer than its table makes it."""
    parts = [
        "# Evaluation 评测报告",
        _models(report),
        "## Summary 总览",
        summary(report),
        "## Beside published scores 与已发表结果对照",
        _published(report, published),
    ]
    for kind, name in KINDS.items():
        sections = [section for section in report.sections if section.kind == kind]
        if sections:
            parts += [f"## {name}", *(part for section in sections for part in _section(section))]
    parts.append("## Environment 环境")
    for about in report.models:
        parts += [f"### {escape(about.model)}", _table(["", ""], [*map(list, tables.environment(about))], left=2)]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(report: Report) -> str:
    """The table of tasks and models alone, with what bold means."""
    rows = []
    for section in report.sections:
        first = section.entries[0].metric(section.headline)
        cells = []
        for about in report.models:
            text = _number(tables.headline_of(section, about.model))
            cells.append(f"**{text}**" if section.leader == about.model else text)
        name = heading(first) if first else "—"
        rows.append([escape(section.label), escape(name), tables.headline_counts(section), *cells])
    head = ["Task", "Metric", "n", *(escape(about.model) for about in report.models)]
    said = (
        "\n\nIn brackets 95 % intervals. Bold: better than every other model by the paired comparison, p below "
        "0.05 over the number of other models."
    )
    return _table(head, rows, left=2, raw=True) + (
        said if len(report.models) > 1 else "\n\nIn brackets 95 % intervals."
    )


def escape(text: str) -> str:
    """A text that stands for itself in Markdown, in one line, also inside a table."""
    return _ACTS.sub(r"\\\1", visible(text).replace("\n", " ").replace("\t", " "))


def _models(report: Report) -> str:
    return "\n".join(f"- **{escape(about.model)}**: {escape(about.directory)}" for about in report.models)


def _published(report: Report, published: Published) -> str:
    matched = tables.matched_columns(report, published)
    said = f"From [{escape(published.source)}]({published.url}), [paper]({published.paper}). {escape(published.note)}"
    if not matched:
        return (
            f"{said}\n\nNone of the tasks of this evaluation counts on the same items in the same way, so no score of "
            f"it stands beside these.\n\n{_published_table([], published.columns, published)}"
        )
    ours = tables.beside_rows(report, matched)
    return f"{said}\n\n{_published_table(ours, matched, published)}\n\n" + "\n".join(
        f"- **{escape(names)}** ({comparable}): {escape(note)}"
        for names, comparable, note in tables.column_notes(matched)
    )


def _published_table(
    ours: Sequence[tuple[str, list[tables.Beside | None]]], columns: Sequence[Column], published: Published
) -> str:
    head = ["Model", *(f"{column.name} {column.metric}{f', n {column.n:,}' if column.n else ''}" for column in columns)]
    rows = [[f"**{escape(model)}**", *(_beside(found) if found else "—" for found in cells)] for model, cells in ours]
    for model in published.models:
        scores = (column.scores[model] for column in columns)
        cells = [f"{number(score.value, '%')} {bounds(score.low, score.high, '%')}".strip() for score in scores]
        rows.append([escape(model), *cells])
    return _table(head, rows, raw=True)


def _beside(found: tables.Beside) -> str:
    return f"{_number(found.metric)} ({escape(found.source)}, n {found.metric.n:,})"


def _section(section: Section) -> Iterable[str]:
    models = [escape(entry.model) for entry in section.entries]
    yield f"### {escape(section.label)}"
    yield escape(" · ".join(f"{name} {value}" for name, value in tables.brief_settings(section)))
    first = section.entries[0]
    rows = []
    for metrics in tables.metric_rows(section):
        rows.append([escape(heading(_first(metrics))), tables.counts(metrics), *map(_number, metrics)])
    yield _table(["Metric", "n", *models], rows, raw=True)
    yield "\n\n".join(map(escape, tables.baselines(section)))
    yield "\n".join(f"- {escape(note)}" for note in tables.notes(section))
    if section.comparisons:
        yield _table(
            ["Models", "Metric", "Difference", "p", "higher / equal / lower"],
            [_comparison(each, tables.unit(first, each.metric)) for each in section.comparisons],
            left=2,
        )
    if names := tables.group_metric_names(section):
        rows = []
        for group in tables.group_names(section):
            found = [tables.group_metric(entry, group, name) for entry in section.entries for name in names]
            rows.append([escape(group), tables.group_counts(section, group), *map(_number, found)])
        heads = [
            f"{escape(title(name))}{f', {model}' if len(models) > 1 else ''}" for model in models for name in names
        ]
        yield _table(["Group", "n", *heads], rows, raw=True)
    counted, never = tables.count_rows(section)
    if counted:
        rows = [[escape(title(name)), *(f"{n:,}" for n in row)] for name, row in counted]
        yield _table(["Count", *models], rows, raw=True)
    if never:
        yield escape(f"Looked for and not found: {', '.join(map(title, never))}.")
    if section.wins:
        yield _table(
            ["Models", "Win rate (%)", "won / tied / lost", "Longer by (tokens)", "At equal length (%)"],
            [_win(each) for each in section.wins],
        )
    leaked = tables.contamination(section)
    if leaked.said:
        yield "\n".join(f"- {escape(line)}" for line in leaked.said)
        rows = [[escape(title(_first(row).name)), tables.counts(row), *map(_number, row)] for row in leaked.metrics]
        yield _table(["On the others", "n", *models], rows, raw=True)
    settings = [[name, *row] for name, row in tables.setting_rows(section)]
    yield _table(["Setting", *(entry.model for entry in section.entries)], settings, left=1 + len(models))


def _comparison(each: Comparison, unit: str) -> list[str]:
    d = each.difference
    by = "bootstrap" if d.mcnemar is None else "McNemar"
    return [
        f"{each.a} − {each.b}",
        title(each.metric),
        f"{signed(d.value, unit)} {bounds(d.low, d.high, unit)}",
        f"{probability(each.p)} ({by})",
        f"{d.higher:,} / {d.equal:,} / {d.lower:,}{_unshared(d.unshared)}",
    ]


def _win(each: Wins) -> list[str]:
    found = each.rate
    rate, near = (
        f"{number(share.value, '%')} {bounds(share.low, share.high, '%')}" for share in (found.rate, found.rate_near)
    )
    longer = f"{signed(found.longer.value, 'tokens')} {bounds(found.longer.low, found.longer.high, 'tokens')}"
    counts = f"{found.wins:,} / {found.ties:,} / {found.losses:,}{_unshared(found.unpaired)}"
    return [f"{each.a} : {each.b}", rate, counts, longer, f"{near}, {found.near:,} pairs"]


def _unshared(count: int) -> str:
    return f", {count:,} not of both" if count else ""


def _first(metrics: Sequence[Metric | None]) -> Metric:
    return next(metric for metric in metrics if metric)


def _number(metric: Metric | None) -> str:
    if metric is None:
        return "—"
    return f"{number(metric.value, metric.unit)} {bounds(metric.low, metric.high, metric.unit)}".strip()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, raw: bool = False) -> str:
    """A table; the first `left` columns begin at the left, the others end at the right. raw: cells are Markdown."""
    if not raw:
        head, rows = [escape(cell) for cell in head], [[escape(cell) for cell in row] for row in rows]
    rule = ["---" if place < left else "---:" for place in range(len(head))]
    wide = ([*row, *[""] * (len(head) - len(row))] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *wide))
