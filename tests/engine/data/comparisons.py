"""Comparisons of many lengths, each with a first question of its own, and what they become on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.data.groups import PreferenceSet, open_groups
from engine.data.preference_files import PreferenceOptions
from engine.data.prepare import prepare
from engine.data.ranked_encoder import RankedEncoder
from model.chat import ChatTemplate
from model.tokenizer import Tokenizer
from tests.engine.data.dialogues import made_up_text, write


def comparisons(count: int, seed: int = 0, most_answers: int = 5) -> list[dict[str, Any]]:
    """Graded lists of 2 to `most_answers` answers."""
    chance = np.random.default_rng(seed)
    records = []
    for number in range(count):
        size = int(chance.integers(2, most_answers + 1))
        grades = [1, *chance.integers(0, 2, size - 2).tolist(), 0]
        # Each text unlike all others.
        responses = [
            {"text": f"{place}、{made_up_text(chance, 40)}", "score": grade} for place, grade in enumerate(grades)
        ]
        records.append({"prompt": f"第{seed}之{number}问：{made_up_text(chance, 20)}", "responses": responses})
    return records


def ranked_encoder(tokenizer: Tokenizer, context: int = 128, template: str = "chimed", most: int = 9) -> RankedEncoder:
    return RankedEncoder(ChatTemplate.named(template, tokenizer), tokenizer, context, most)


def open_files(directory: Path, paths: list[Path], encoder: RankedEncoder, **options: Any) -> PreferenceSet:
    """The groups of some files, prepared in a directory."""
    given = PreferenceOptions(**options)
    prepare(paths, encoder, directory, given, workers=1)
    return open_groups(directory, None, given.max_responses)


def open_records(
    directory: Path, records: list[Any], tokenizer: Tokenizer, context: int = 128, **options: Any
) -> PreferenceSet:
    """The groups of some records."""
    directory.mkdir()
    raw = write(directory / "raw.jsonl", records)
    encoder = ranked_encoder(tokenizer, context, most=options.get("max_responses", 9))
    return open_files(directory / "prepared", [raw], encoder, **options)
