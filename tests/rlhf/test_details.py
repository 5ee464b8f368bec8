"""The page of details and the table of mutations name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutate_rlhf import Mutation, read_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "rlhf-details.md").read_text(encoding="utf-8")
ROWS = {int(number): row for row, number in re.findall(r"^(\| (\d+) \|.*)$", PAGE, re.MULTILINE)}
TABLE = read_table()


def exists(file: Path, test: str) -> bool:
    return file.is_file() and f"\ndef {test}(" in file.read_text(encoding="utf-8")


def test_every_detail_is_proven_or_cannot_occur() -> None:
    assert sorted(ROWS) == list(range(1, 50))
    for number, row in ROWS.items():
        assert "::test_" in row or "*Cannot occur*" in row, number


@pytest.mark.parametrize("number", sorted(ROWS))
def test_the_tests_and_files_that_a_detail_names_exist(number: int) -> None:
    for file, test in re.findall(r"`([\w/]+\.py)::(\w+)`", ROWS[number]):
        assert exists(ROOT / "tests" / file, test), f"{file}::{test}"
    for file in re.findall(r"`([\w/]+\.py)`", ROWS[number]):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("mutation", TABLE, ids=lambda mutation: mutation.breaks)
def test_a_mutation_still_fits_the_code_and_its_test_is_there(mutation: Mutation) -> None:
    assert mutation.misfit() is None
    file, _, test = mutation.test.partition("::")
    assert exists(ROOT / file, test.partition("[")[0])
    assert int(mutation.detail) in ROWS


def test_at_least_half_of_the_details_are_broken() -> None:
    assert len({mutation.detail for mutation in TABLE}) >= 25
