"""Longest common subsequences, beside tables that are filled cell by cell."""

from __future__ import annotations

import random

from evals.lcs import common_subsequence, lcs_length


def table(a: str, b: str) -> list[list[int]]:
    """Lengths of all beginnings of `a` by all beginnings of `b`."""
    rows = [[0] * (len(b) + 1)]
    for token in a:
        row = [0]
        for place, other in enumerate(b):
            row.append(rows[-1][place] + 1 if token == other else max(rows[-1][place + 1], row[-1]))
        rows.append(row)
    return rows


def walk_back(a: str, b: str) -> list[str]:
    """As rouge 1.0.1 reads one out of the table."""
    lengths, i, j, found = table(a, b), len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def pairs(count: int, longest: int) -> list[tuple[str, str]]:
    draw = random.Random(0)
    made = []
    for number in range(count):
        alphabet = "甲乙丙丁戊己庚辛壬癸"[: 1 + number % 10]
        made.append(tuple("".join(draw.choices(alphabet, k=draw.randint(0, longest))) for _ in range(2)))
    return made


def test_lengths_are_those_of_the_table() -> None:
    for a, b in pairs(2000, 30) + pairs(20, 300):
        assert lcs_length(a, b) == table(a, b)[-1][-1]


def test_of_several_subsequences_the_one_of_the_table_is_read() -> None:
    for a, b in pairs(2000, 30) + pairs(20, 300):
        assert common_subsequence(a, b) == walk_back(a, b)


def test_a_hand_worked_case() -> None:
    assert lcs_length("每日三次饭后", "每次饭前三次") == 3  # 每 .. 三次, or 每次饭
    assert common_subsequence("甲乙", "乙甲") == ["乙"]  # both keep one: the last of the second text goes first
    assert common_subsequence("", "甲") == []
