"""Which samples are worth learning from: the best of each prompt, a share of them, or the best of all.

Best of K per prompt is Llama 2's rejection sampling (Touvron et al. 2023, 3.2.3), a share per prompt that of trlx, and
the global top N what ChiMed-GPT's own script keeps: it prefers prompts that are easy to answer well.

Drawing N and keeping the best leads away from the policy by a KL divergence of at most ln N - (N - 1)/N (Beirami et al.
2024), where all of them were scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np

from model.errors import InputError


@dataclass
class SelectConfig:
    """What is kept of all samples."""

    by: Literal["best", "fraction", "top"] = "best"
    """best: so many answers of each prompt; fraction: a share of each prompt's answers; top: so many of all answers"""
    keep: float = 1.0
    """how many, or which share"""
    earlier_rounds: bool = True
    """choose from the samples of all rounds so far, not only from this one's"""
    truncated: bool = False
    """also choose answers that have no end; they teach not to stop"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        if self.by == "fraction" and not 0 < self.keep <= 1:
            raise InputError(f"--select.keep is {self.keep}. Use a share above 0, up to 1, of each prompt's answers.")
        if self.by != "fraction" and not (self.keep >= 1 and self.keep == int(self.keep)):
            raise InputError(f"--select.keep is {self.keep}. Use a whole number of answers, 1 or more.")


class Pool(NamedTuple):
    """N samples to choose from, as columns; where scores are equal, the earlier row goes before.

    prompt: int64 [N], which prompt it answers.
    answer: uint64 [N], `answer_key` of its text.
    score: fp32 [N], finite.
    is_complete: bool [N], whether the answer ended by itself.
    """

    prompt: np.ndarray
    answer: np.ndarray
    score: np.ndarray
    is_complete: np.ndarray

    @classmethod
    def join(cls, pools: list[Pool]) -> Pool:
        """The rows of several, one behind the other."""
        return cls(*map(np.concatenate, zip(*pools, strict=True)))


def answer_key(text: str) -> int:
    """64 bits by which the answers of a prompt are told apart: not by spaces around them."""
    return int.from_bytes(blake2b(text.strip().encode("utf-8", "replace"), digest_size=8).digest(), "little")


def select(pool: Pool, config: SelectConfig) -> np.ndarray:
    """Rows that are chosen, ascending: int64 [M]."""
    assert np.isfinite(pool.score).all()
    rows = np.arange(len(pool.prompt)) if config.truncated else np.flatnonzero(pool.is_complete)
    rows = drop_duplicates(pool, rows)
    if config.by == "top":
        order = np.lexsort((rows, -pool.score[rows]))
        return np.sort(rows[order[: int(config.keep)]])
    order = np.lexsort((rows, -pool.score[rows], pool.prompt[rows]))
    rows = rows[order]
    _, first, counts = np.unique(pool.prompt[rows], return_index=True, return_counts=True)
    kept = np.full(len(counts), int(config.keep))
    if config.by == "fraction":
        share = Fraction(str(config.keep))  # by its decimal digits, so that 0.07 of 100 are 7
        kept = -(-counts * share.numerator // share.denominator)
    rank = np.arange(len(rows)) - np.repeat(first, counts)
    return np.sort(rows[rank < np.repeat(kept, counts)])


def drop_duplicates(pool: Pool, rows: np.ndarray) -> np.ndarray:
    """Of the rows [M], ascending, the first with each prompt and answer."""
    order = np.lexsort((rows, pool.answer[rows], pool.prompt[rows]))
    prompt, answer = pool.prompt[rows][order], pool.answer[rows][order]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (prompt[1:] != prompt[:-1]) | (answer[1:] != answer[:-1])
    return np.sort(rows[order[is_first]])
