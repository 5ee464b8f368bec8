"""A report as one HTML page that needs nothing beside it: no script, no file, no network.

`report.html.jinja` says what stands where, `report.css` what it looks like. Everything that comes from a model, a file
or a name is escaped by the template engine, and what would act on a reader's screen is made visible.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from evals import plots
from evals import report_format as form
from evals import report_tables as tables
from evals.published import Published
from evals.report_facts import Entry, Report, Section
from evals.task import Metric

HERE = Path(__file__).parent

FOLD, MOST = 480, 20_000
"""Characters of a text that are shown at once, and that are in the page at all."""


class Plot(NamedTuple):
    """What a figure shows: rows by name, the axis under them, who is in it, and what it says."""

    models: list[str]
    rows: list[tuple[str, Markup]]
    axis: Markup
    caption: str


def render(report: Report, published: Published) -> str:
    """The page, UTF-8 when written."""
    series = {about.model: place for place, about in enumerate(report.models)}
    matched = tables.matched_columns(report, published)
    kinds = [(kind, name) for kind, name in form.KINDS.items() if any(each.kind == kind for each in report.sections)]
    page = _environment().get_template("report.html.jinja")
    return page.render(
        report=report,
        published=published,
        matched=matched,
        ours=tables.beside_rows(report, matched),
        kinds=kinds,
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        items=sum(max(entry.items for entry in section.entries) for section in report.sections),
        date=max(about.date for about in report.models)[:10],
        series=series,
        anchors={section.label: f"task-{place}" for place, section in enumerate(report.sections)},
        overview=_overview(report, series),
        groups_plot=lambda section: _groups_plot(section, series),
    )


def folded(text: str, end: bool) -> tuple[str, str, int]:
    """A text that is too long to be shown at once.

    Args:
        end: whether its end says most, as a prompt's does; otherwise its beginning.
    Returns:
        what is shown at once, "" where all of it is; what is shown on request; how many characters are shown never.
    """
    short = ("…" + text[-FOLD // 2 :] if end else text[: FOLD // 2] + "…") if len(text) > FOLD else ""
    whole = text[-MOST:] if end else text[:MOST]
    return short, whole, len(text) - len(whole)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=form.number, named=form.title, exact=_exact, thousands="{:,}".format)
    environment.tests["finite"] = math.isfinite
    environment.globals.update(
        bounds=form.bounds,
        signed=form.signed,
        probability=form.probability,
        heading=form.heading,
        folded=folded,
        key=plots.key,
        tables=tables,
    )
    return environment


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else form.visible(value)


def _exact(value: float) -> str:
    """All digits, as in report.json."""
    return repr(float(value))


def _overview(report: Report, series: dict[str, int]) -> Plot | None:
    """Headline metrics that are fractions, on one axis."""
    shown = [
        section
        for section in report.sections
        if (first := section.entries[0].metric(section.headline)) and first.unit == "%"
    ]
    rows = [(section.label, section.entries, section.headline, tables.reference(section)) for section in shown]
    caption = "Headline metrics in percent with 95 % intervals."
    if any(references for *_, references in rows):
        caption += " Dashed: the best that is reached without a model."
    return _plot([each.model for each in report.models], rows, "%", series, caption) if rows else None


def _groups_plot(section: Section, series: dict[str, int]) -> Plot | None:
    """The first metric of each group."""
    names = tables.group_metric_names(section)
    if not names:
        return None
    name, unit = names[0], tables.unit(section.entries[0], names[0])
    rows: list[Any] = []
    for group in tables.group_names(section):
        entries = [entry for entry in section.entries if (found := tables.group_metric(entry, group, name)) and found.n]
        if entries:
            rows.append((group, entries, name, []))
    caption = f"{form.title(name)}{' in percent' if unit == '%' else f' ({unit})' if unit else ''} with 95 % intervals."
    models = [entry.model for entry in section.entries]
    return _plot(models, rows, unit, series, caption, by_group=True) if len(rows) > 1 else None


def _plot(
    models: list[str],
    rows: list[Any],
    unit: str,
    series: dict[str, int],
    caption: str,
    by_group: bool = False,
) -> Plot:
    """Rows are (name, entries, metric, references)."""
    drawn = []
    for name, entries, metric, references in rows:
        found = [
            (entry, tables.group_metric(entry, name, metric) if by_group else entry.metric(metric)) for entry in entries
        ]
        drawn.append((name, [(entry, value) for entry, value in found if value is not None], references))
    points = {id(value): _point(series, entry, value) for _, found, _ in drawn for entry, value in found}
    every = [reference for _, _, references in drawn for reference in references]
    scale = plots.scale_of(list(points.values()), every, (0.0, 1.0) if unit == "%" else None)
    lines = [
        (
            name,
            plots.row([points[id(value)] for _, value in found], scale, form.visible(_said(name, found)), references),
        )
        for name, found, references in drawn
    ]
    return Plot(models, lines, plots.axis(scale, [form.mark(mark, unit) for mark in scale.marks]), caption)


def _point(series: dict[str, int], entry: Entry, metric: Metric) -> plots.Point:
    return plots.Point(series[entry.model], metric.value, metric.low, metric.high)


def _said(name: str, found: list[tuple[Entry, Metric]]) -> str:
    values = (
        f"{entry.model} {form.number(metric.value, metric.unit)} {form.bounds(metric.low, metric.high, metric.unit)}"
        for entry, metric in found
    )
    return f"{name}: {'; '.join(value.strip() for value in values)}"
