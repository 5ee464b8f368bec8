"""Which row holds what: the tables of a report, of values that `evals.report_format` writes down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from evals.published import Column, Published
from evals.report_facts import About, Clean, Entry, Report, Section
from evals.report_format import number, setting, title
from evals.task import Metric

_BRIEF = ("task", "protocol", "mode", "prompting", "shots", "limit", "signature")
"""Settings that stand under a task's name; all of them are in its table of settings."""

_COMPARABLE = {"yes": "comparable", "partly": "comparable in part", "no": "not comparable"}


class Beside(NamedTuple):
    """Our score beside a published one, and where it is from: the task, its protocol if it has several."""

    source: str
    metric: Metric


class Contaminated(NamedTuple):
    """What was found in the training texts, in sentences, and rows of metrics on the items that are not flagged, a
    place in each for each model."""

    said: list[str]
    metrics: list[list[Metric | None]]


def entry_of(section: Section, model: str) -> Entry | None:
    """A model's results in a task; None if it was not asked."""
    return next((entry for entry in section.entries if entry.model == model), None)


def headline_of(section: Section, model: str) -> Metric | None:
    """The number by which a model's results in a task are summed up."""
    entry = entry_of(section, model)
    return entry.metric(section.headline) if entry else None


def metric_rows(section: Section) -> list[list[Metric | None]]:
    """A row for each metric that any model has, a place in it for each model."""
    names = dict.fromkeys(metric.name for entry in section.entries for metric in entry.metrics)
    return [[entry.metric(name) for entry in section.entries] for name in names]


def group_names(section: Section) -> list[str]:
    """Groups in the order of the first model that has them."""
    return list(dict.fromkeys(group for entry in section.entries for group in entry.groups))


def group_metric_names(section: Section) -> list[str]:
    """Metrics that any group has."""
    return list(
        dict.fromkeys(metric.name for entry in section.entries for group in entry.groups.values() for metric in group)
    )


def group_metric(entry: Entry, group: str, name: str) -> Metric | None:
    """A model's metric in a group."""
    return next((metric for metric in entry.groups.get(group, ()) if metric.name == name), None)


def counts(metrics: Sequence[Metric | None]) -> str:
    """Of how many items metrics are; where models differ, of each."""
    found = list(dict.fromkeys(metric.n for metric in metrics if metric))
    return " / ".join(f"{n:,}" for n in found) or "—"


def headline_counts(section: Section) -> str:
    """Of how many items the headline metric is."""
    return counts([headline_of(section, entry.model) for entry in section.entries])


def group_counts(section: Section, group: str) -> str:
    """Of how many items a group's first metric is."""
    return counts([next(iter(entry.groups.get(group, ())), None) for entry in section.entries])


def count_rows(section: Section) -> tuple[list[tuple[str, list[int]]], list[str]]:
    """What was counted for any model, with the count of each; and what was looked for and never found."""
    names = dict.fromkeys(name for entry in section.entries for name in entry.counts)
    rows = [(name, [entry.counts.get(name, 0) for entry in section.entries]) for name in names]
    return [row for row in rows if any(row[1])], [name for name, found in rows if not any(found)]


def setting_rows(section: Section) -> list[tuple[str, list[str]]]:
    """Settings, for each model."""
    names = dict.fromkeys(name for entry in section.entries for name in entry.settings)
    return [(name, [setting(entry.settings.get(name, "—")) for entry in section.entries]) for name in names]


def brief_settings(section: Section) -> list[tuple[str, str]]:
    """The settings that a reader asks for first; where models differ, of each."""
    rows = dict(setting_rows(section))
    shown = [name for name in _BRIEF if name in rows and rows[name] != [section.label] * len(section.entries)]
    return [(name, " / ".join(dict.fromkeys(rows[name]))) for name in shown]


def notes(section: Section) -> list[str]:
    """What a reader of the numbers must know; where it is not said of all models, of which."""
    said: dict[str, list[str]] = {}
    for entry in section.entries:
        for note in entry.notes:
            said.setdefault(note, []).append(entry.model)
    return [note if len(by) == len(section.entries) else f"{', '.join(by)}: {note}" for note, by in said.items()]


def baselines(section: Section) -> list[str]:
    """What metrics are without a model, in as few sentences as can be: one for each metric, or one for each way."""
    first = section.entries[0]
    by_metric: dict[str, list[str]] = {}
    by_way: dict[str, list[str]] = {}
    for way, metric, value in first.baselines:
        written = number(value, unit(first, metric))
        by_metric.setdefault(f"{title(metric)} without a model", []).append(f"{way} {written}")
        by_way.setdefault(f"{way[:1].upper()}{way[1:]}, without a model", []).append(f"{title(metric)} {written}")
    fewest = min(by_metric, by_way, key=len)
    return [f"{subject}: {', '.join(known)}." for subject, known in fewest.items()]


def contamination(section: Section) -> Contaminated:
    """What was found; nothing where nobody looked."""
    said: dict[str, list[str]] = {}
    for entry in section.entries:
        if entry.clean:
            said.setdefault(_contaminated(entry.clean), []).append(entry.model)
    lines = [line if len(by) == len(section.entries) else f"{', '.join(by)}: {line}" for line, by in said.items()]
    clean = [
        {metric.name: metric for metric in entry.clean.metrics} if entry.clean else {} for entry in section.entries
    ]
    names = dict.fromkeys(name for metrics in clean for name in metrics)
    return Contaminated(lines, [[metrics.get(name) for metrics in clean] for name in names])


def _contaminated(clean: Clean) -> str:
    unchecked = f" {clean.unchecked:,} are too short to look for." if clean.unchecked else ""
    return (
        f"{clean.flagged:,} of {clean.items:,} items stand in the training texts ({', '.join(clean.shards)}) and are "
        f"flagged; {clean.touched:,} share a stretch of {clean.gram} letters with them. Of all such stretches "
        f"{100 * clean.share:.2f} % are found there.{unchecked}"
    )


def unit(entry: Entry, metric: str) -> str:
    """Of a metric, also one that only groups have."""
    candidates: Iterator[Metric] = (
        found for metrics in (entry.metrics, *entry.groups.values()) for found in metrics if found.name == metric
    )
    return next((found.unit for found in candidates), "")


def reference(section: Section) -> list[float]:
    """The best that the headline metric is without a model, if that is known: what a model has to beat."""
    first = section.entries[0]
    headline = first.metric(section.headline)
    values = [value for _, metric, value in first.baselines if metric == section.headline and math.isfinite(value)]
    if not values or headline is None or headline.better is None:
        return []
    return [max(values) if headline.better == "higher" else min(values)]


def beside(report: Report, column: Column, model: str) -> Beside | None:
    """A model's score on what a published column was computed on, or nearly so."""
    for section in report.sections:
        if (entry := entry_of(section, model)) is None:
            continue
        for name in column.beside.get(str(entry.settings.get("task", section.label)), ()):
            found = entry.metric(name)
            if found and found.unit == "%" and math.isfinite(found.value):
                protocol = entry.settings.get("protocol", entry.settings.get("mode"))
                return Beside(f"{section.label}, {protocol}" if protocol else section.label, found)
    return None


def beside_rows(report: Report, columns: Sequence[Column]) -> list[tuple[str, list[Beside | None]]]:
    """Our models' rows of a published table."""
    return [(each.model, [beside(report, column, each.model) for column in columns]) for each in report.models]


def matched_columns(report: Report, published: Published) -> list[Column]:
    """Published columns that any of our scores stands beside."""
    return [
        column
        for column in published.columns
        if any(beside(report, column, each.model) is not None for each in report.models)
    ]


def column_notes(columns: Sequence[Column]) -> list[tuple[str, str, str]]:
    """(columns, whether they may be compared in words, note), every note once."""
    said: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        said.setdefault((_COMPARABLE[column.comparable], column.note), []).append(f"{column.name} {column.metric}")
    return [(", ".join(names), comparable, note) for (comparable, note), names in said.items()]


def environment(about: About) -> list[tuple[str, str]]:
    """How a model's numbers were made."""
    fixed: Mapping[str, Any] = {
        "directory": about.directory,
        "fingerprint": about.fingerprint,
        "date": about.date,
        "command": about.command,
    }
    return [(name, str(value)) for name, value in {**fixed, **about.versions}.items() if value]
