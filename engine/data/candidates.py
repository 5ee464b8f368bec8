"""Graded answers that came one by one, joined to groups by their prompts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.data.preferences import spread


class Joined(NamedTuple):
    """What is compared with what.

    rows: candidates that are kept, group by group, in their order.
    owners: the number of each one's group, from 0.
    duplicates: candidates that repeat an earlier one.
    beyond_most: candidates of groups that have too many.
    left_out: for each prompt whose candidates teach nothing, the first of them, and why.
    """

    rows: np.ndarray
    owners: np.ndarray
    duplicates: int
    beyond_most: int
    left_out: list[tuple[int, str]]


def join(prompts: np.ndarray, answers: np.ndarray, grades: np.ndarray, most: int) -> Joined:
    """Candidates to groups, by sorting.

    Args:
        prompts, answers: 64 bits that stand for each, [N].
        grades: fp32 [N].
        most: candidates of a group.
    """
    rows = np.arange(len(prompts))
    if not len(rows):
        return Joined(rows, rows, 0, 0, [])
    _, owners = np.unique(prompts, return_inverse=True)
    # Equal answers side by side, the earliest first.
    order = np.lexsort((rows, answers, owners))
    rows, owners = rows[order], owners[order]
    is_repeat = np.r_[False, (owners[1:] == owners[:-1]) & (answers[rows[1:]] == answers[rows[:-1]])]
    twin = np.maximum.accumulate(np.where(is_repeat, 0, np.arange(len(rows))))
    is_other = grades[rows] != grades[rows[twin]]
    duplicates = int((is_repeat & ~is_other).sum())
    is_contradicted = np.bincount(owners, is_other) > 0
    order = np.lexsort((rows[~is_repeat], owners[~is_repeat]))
    rows, owners = rows[~is_repeat][order], owners[~is_repeat][order]

    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
    counts = np.diff(np.r_[starts, len(rows)])
    low, high = (find.reduceat(grades[rows], starts) for find in (np.minimum, np.maximum))
    has_order = (low < high) & ~is_contradicted
    left_out = [
        (int(rows[starts[group]]), _reason(bool(is_contradicted[group]), int(counts[group])))
        for group in np.flatnonzero(~has_order)
    ]
    is_kept = np.repeat(has_order, counts)
    too_many = np.flatnonzero(has_order & (counts > most))
    for group in too_many:
        members = slice(starts[group], starts[group] + counts[group])
        is_kept[members] = False
        is_kept[members.start + np.array(spread(grades[rows[members]].tolist(), most))] = True
    _, renumbered = np.unique(owners[is_kept], return_inverse=True)
    return Joined(rows[is_kept], renumbered, duplicates, int((counts[too_many] - most).sum()), left_out)


def _reason(is_contradicted: bool, count: int) -> str:
    if is_contradicted:
        return "an answer to this question has two grades"
    return "this question has one answer" if count == 1 else f"all {count} answers to this question have one grade"
