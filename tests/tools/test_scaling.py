"""The page on scaling shows what the tool prints today. `python -m tests.tools.test_scaling` writes it anew."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.in_child import TOOLS, run_tool

PAGE = TOOLS.parent / "docs/scaling.md"
# A command, and the indented lines under it.
SHOWN = re.compile(r"^    \$ python tools/scaling\.py(.*)\n((?:    .*\n)+)", re.MULTILINE)


def printed(words: str, folder: Path) -> str:
    """Indented, as pages have it."""
    (ended,) = run_tool("scaling", *shlex.split(words), cwd=folder)
    assert ended.code == 0, ended.stderr
    return "".join(f"    {line}\n" for line in ended.stdout.splitlines())


def anew(page: str, print_it: Callable[[str], str]) -> str:
    """The page with what its commands print."""
    return SHOWN.sub(lambda shown: f"    $ python tools/scaling.py{shown[1]}\n{print_it(shown[1])}", page)


@pytest.mark.parametrize("words", [shown[1] for shown in SHOWN.finditer(PAGE.read_text(encoding="utf-8"))])
def test_the_page_shows_what_the_tool_prints(words: str, tmp_path: Path) -> None:
    tables = dict(SHOWN.findall(PAGE.read_text(encoding="utf-8")))
    assert tables[words] == printed(words, tmp_path), "python -m tests.tools.test_scaling writes the page anew"


def test_the_page_has_tables_of_each_kind() -> None:
    tables = dict(SHOWN.findall(PAGE.read_text(encoding="utf-8")))
    assert len(tables) >= 5 and "" in tables
    assert any("times as fast" in table for table in tables.values())
    assert any("--longest" in words for words in tables)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(
            anew(PAGE.read_text(encoding="utf-8"), lambda words: printed(words, Path(folder))), encoding="utf-8"
        )
