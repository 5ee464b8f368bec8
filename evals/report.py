"""The report of an evaluation in three forms that say the same.

    report.json     everything, nothing rounded, for programs
    report.md       the tables, for a repository or a terminal
    report.html     one page with plots and samples, for readers

Predictions lie beside the responses (`evals.store`); a report shows a few of them. Whatever is known is in the
evaluations, so writing a report again needs no model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from engine.files import write_durably
from evals import report_html, report_markdown
from evals.evaluation import Evaluation
from evals.published import Published, read_published
from evals.report_facts import Report, gather

SCHEMA = 1
"""Of report.json: it grows when a field changes its name or meaning, not when one is added."""


def write_report(evaluations: Sequence[Evaluation], out: Path) -> Report:
    """Write report.json, report.md and report.html into a folder that is made where it is not there.

    Raises:
        InputError: there is no evaluation, or two are of models with one name.
        OSError: the folder cannot be written.
    """
    report, published = gather(evaluations), read_published()
    forms = {
        "report.json": to_json(report, published),
        "report.md": report_markdown.render(report, published),
        "report.html": report_html.render(report, published),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in forms.items():
        write_durably(out / name, text)
    return report


def to_json(report: Report, published: Published) -> str:
    """The report as JSON: dataclasses and named tuples as objects of their fields, what is no number as null."""
    whole = {"schema": SCHEMA, **_plain(report), "published": _plain(published)}
    # Lone halves of surrogate pairs cannot be written in UTF-8; as escapes they can.
    text = json.dumps(whole, ensure_ascii=False, indent=1, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
