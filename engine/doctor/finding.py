"""What was looked at, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

State = Literal["good", "note", "wrong"]
_MARKS = {"good": "  ok ", "note": "note ", "wrong": "FAIL "}


class Finding(NamedTuple):
    """One line of the report.

    state: note: training works, but not as well as it could, or something will be missed; wrong: it cannot work.
    found: in a few words.
    remedy: a sentence; "" where nothing is to be done.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def render(findings: Sequence[Finding]) -> str:
    """A line a finding, its remedy below it, and a verdict."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.state]}{finding.name:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<{width + 7}}→ {finding.remedy}")
    wrong = [finding.name for finding in findings if finding.state == "wrong"]
    if wrong:
        lines.append(f"\nTraining cannot work here: mend {', '.join(wrong)}.")
    else:
        lines.append("\nTraining can work here.")
    return "\n".join(lines)
