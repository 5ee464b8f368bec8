"""What rounds of rejection sampling have brought, in numbers and in examples."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.intervals import clustered_difference
from model.chat import ChatTemplate, Encoded, Message
from model.tokenizer import Tokenizer
from rlhf.draws import Draws
from rlhf.selection import Pool

_EXAMPLES, _SHOWN = 3, 120  # picks that are shown, and characters of their texts
_BATCH = 256


def describe_round(own: Pool, pool: Pool, chosen: np.ndarray) -> dict[str, Any]:
    """Numbers of a round.

    Args:
        own: the samples of this round alone.
        pool: all samples that were chosen from; chosen: rows of it.
    """
    first = len(pool.prompt) - len(own.prompt)
    return {
        "samples": len(own.prompt),
        "mean_score": float(own.score.mean(dtype=np.float64)),
        "truncated": float(1 - own.is_complete.mean()),
        "picks": len(chosen),
        "picks_of_earlier_rounds": int((chosen < first).sum()),
        "prompts_without_pick": len(np.setdiff1d(pool.prompt, pool.prompt[chosen])),
        "mean_score_of_picks": float(pool.score[chosen].mean(dtype=np.float64)),
    }


def other_ids(picks: Path, template: ChatTemplate, tokenizer: Tokenizer) -> int:
    """Of how many picks the text, encoded again, would give other ids than were sampled."""
    count = 0
    with open(picks, encoding="utf-8") as lines:
        while rows := [json.loads(line) for line in itertools.islice(lines, _BATCH)]:
            turns = [[Message(**message) for message in row["messages"]] for row in rows]
            for row, encoded in zip(rows, template.encode_batch(tokenizer, turns), strict=True):
                sampled = row["prompt_ids"] + row["answer_ids"]
                count += not (isinstance(encoded, Encoded) and encoded.ids == sampled)
    return count


def describe_picks(number: int, facts: dict[str, Any], picks: Path) -> str:
    """A round in a few lines, with some of its picks."""
    lines = [
        f"Round {number}: {facts['samples']:,} samples of mean score {facts['mean_score']:.4f}, "
        f"{facts['truncated']:.1%} without an end; {facts['picks']:,} picks of mean score "
        f"{facts['mean_score_of_picks']:.4f}, {facts['picks_of_earlier_rounds']:,} of them from earlier rounds; "
        f"{facts['prompts_without_pick']:,} prompts without one.",
        f"{facts['other_ids']:,} picks would have other ids if their texts were encoded again: trained are those "
        "that were sampled.",
    ]
    with open(picks, encoding="utf-8") as file:
        for row in map(json.loads, itertools.islice(file, _EXAMPLES)):
            question, answer = row["messages"][-2]["content"], row["messages"][-1]["content"]
            lines.append(f"  {row['score']:+.3f}  {_short(question)}  ->  {_short(answer)}")
    return "\n".join(lines)


def describe_gain(before: Draws, after: Draws) -> str:
    """Scores on held-out prompts before and after, and their difference with its interval."""
    scores = [np.array([row["responses"][0]["score"] for row in draws.rows()]) for draws in (before, after)]
    gain = clustered_difference(scores[1] - scores[0], np.arange(len(scores[0])))
    said = f"held-out prompts: mean score {scores[0].mean():.4f} before, {scores[1].mean():.4f} after; "
    if len(scores[0]) == 1:
        return f"{said}gain {gain.value:+.4f} (one prompt)"
    return (
        f"{said}gain {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] on {len(scores[0]):,} prompts "
        "(95 % interval over prompts)"
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
