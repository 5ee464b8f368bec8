"""What seqeval and nervaluate count on the random texts of `entity_cases`, written down for the tests.

    python -m venv ner && ner/bin/pip install seqeval==1.2.2 nervaluate==1.2.1
    ner/bin/python tests/evals/record_entities.py

seqeval: micro precision, recall and F1 of exact spans and types, each corpus (its strict mode, IOB2). nervaluate: how
many spans are right by its "ent_type", the same type and an overlap, each corpus, over the texts in which no span
overlaps two: where one does, it takes the first, and ours the largest pairing.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.evals.entity_cases import LENGTH, TYPES, Span, corpora, overlaps_are_single  # noqa: E402

CORPORA = 300


def tags(spans: list[Span]) -> list[str]:
    found = ["O"] * LENGTH
    for kind, start, end in spans:
        found[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return found


def main() -> None:
    from nervaluate import Evaluator
    from seqeval.metrics.v1 import precision_recall_fscore_support
    from seqeval.scheme import IOB2

    exact, overlapping = [], []
    for texts in corpora(CORPORA):
        gold, said = ([tags(text[side]) for text in texts] for side in (0, 1))
        scores = precision_recall_fscore_support(gold, said, average="micro", scheme=IOB2, zero_division=0)
        exact.append([float(score) for score in scores[:3]])
        single = [text for text in texts if overlaps_are_single(*text)]
        both = [
            [[{"label": kind, "start": start, "end": end - 1} for kind, start, end in text[side]] for text in single]
            for side in (0, 1)
        ]
        found = Evaluator(*both, tags=list(TYPES), loader="dict").evaluate()
        overlapping.append(found["overall"]["ent_type"].correct)
    record = {
        "versions": {name: version(name) for name in ("seqeval", "nervaluate")},
        "exact": exact,
        "overlapping": overlapping,
    }
    path = ROOT / "tests" / "evals" / "recorded" / "entities.json"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
