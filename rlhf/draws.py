"""Samples on disk: a line a prompt with all its answers, their scores and ids; appended, and never read as a whole.

    {"index": 17, "prompt": [{"role": "user", "content": ...}], "prompt_ids": [...],
     "responses": [{"text": ..., "score": 0.31, "is_complete": true, "ids": [...]}, ...]}

So a file of samples is a file of graded comparisons too, which tools/rm.py and tools/dpo.py read.

Prompts are sampled in chunks, always the same ones together: what is computed side by side rounds alike.
A chunk is on disk whole or is sampled again: killed at any moment, a run ends with the same bytes.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import sync_directory
from rlhf.prompts import Prompt
from rlhf.selection import Pool, answer_key
from rlhf.trajectory import Sample


@dataclass(frozen=True)
class Draws:
    """A file of samples."""

    path: Path

    def resume(self, chunks: Sequence[int]) -> int:
        """Cut off what is no whole chunk. Returns how many chunks there are.

        Args:
            chunks: lines of each chunk, in order.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ends, end = [0], 0
        with open(self.path, "a+b") as file:
            file.seek(0)
            for line in file:
                end += len(line)
                if line.endswith(b"\n"):
                    ends.append(end)
            bounds = np.cumsum([0, *chunks])
            done = int(np.searchsorted(bounds, len(ends) - 1, side="right")) - 1
            file.truncate(ends[bounds[done]])
        return done

    def append(self, prompts: Sequence[Prompt], samples: Sequence[Sample], scores: Sequence[float]) -> None:
        """Write a chunk, durably: samples in the order of prompts, as many for each.

        Where a prompt got the same ids twice they keep the first score: what a reward model computes side by side with
        others may differ in its last bit.
        """
        each = len(samples) // len(prompts)
        rows = []
        for place, prompt in enumerate(prompts):
            own = range(place * each, (place + 1) * each)
            known: dict[tuple[int, ...], float] = {}
            judged = [known.setdefault(tuple(samples[number].answer_ids), scores[number]) for number in own]
            row = {
                "index": prompt.position,
                "prompt": [vars(message) for message in prompt.messages],
                "prompt_ids": prompt.ids,
                "responses": [_response(samples[number], score) for number, score in zip(own, judged, strict=True)],
            }
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        with open(self.path, "ab") as file:
            file.write("".join(rows).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.path.parent)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All lines."""
        with open(self.path, encoding="utf-8") as file:
            yield from map(json.loads, file)

    def pool(self) -> Pool:
        """What is chosen from, in the order of lines and answers."""
        prompt, answer, score, is_complete = array("q"), array("Q"), array("f"), array("b")
        for row in self.rows():
            for response in row["responses"]:
                prompt.append(row["index"])
                answer.append(answer_key(response["text"]))
                score.append(response["score"])
                is_complete.append(response["is_complete"])
        return Pool(
            np.array(prompt, np.int64),
            np.array(answer, np.uint64),
            np.array(score, np.float32),
            np.array(is_complete, bool),
        )


def _response(sample: Sample, score: float) -> dict[str, Any]:
    return {
        "text": sample.text,
        "score": score,
        "is_complete": sample.end_reason == "stop",
        "ids": sample.answer_ids,
    }


def picked(draws: Sequence[Draws], first_round: int, chosen: np.ndarray) -> Iterator[dict[str, Any]]:
    """The chosen samples of several files, as conversations with the ids that were sampled.

    Args:
        first_round: number of the round that the first file is of; the others follow.
        chosen: int64 [M], ascending, rows of the files' pools one behind the other.
    """
    wanted = iter(chosen.tolist())
    following, number = next(wanted, None), 0
    for round_number, file in enumerate(draws, first_round):
        for row in file.rows():
            for response in row["responses"]:
                if number == following:
                    yield {
                        "messages": [*row["prompt"], {"role": "assistant", "content": response["text"]}],
                        "score": response["score"],
                        "index": row["index"],
                        "round": round_number,
                        "prompt_ids": row["prompt_ids"],
                        "answer_ids": response["ids"],
                    }
                    following = next(wanted, None)
                number += 1
