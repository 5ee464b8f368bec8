"""What became of a model's evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evals.task import Result


@dataclass(frozen=True)
class Evaluation:
    """All that a report says of one model.

    model: its name in tables.
    directory, fingerprint: where it lies, and what it was.
    results, settings, kinds: by the label of a task: what came of it, what decided the numbers (`Task.settings` and
        what the respondent adds), and `Task.kind`.
    contamination: by label, what `evals.contamination.find_overlap` found; empty where nobody looked.
    date: of the first response, ISO 8601 in UTC.
    versions: of this program and the libraries that numbers depend on, by name.
    command: that made it.
    """

    model: str
    directory: str
    fingerprint: str
    results: Mapping[str, Result]
    settings: Mapping[str, Mapping[str, Any]]
    kinds: Mapping[str, str]
    contamination: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
