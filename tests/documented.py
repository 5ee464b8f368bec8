"""What the documentation says can be typed, and the parser that each tool would read it by."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from engine.config import _leaf_fields, parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[a-z]*/README.md")})
RECIPES = sorted(ROOT.glob("configs/**/*.yaml"))
SUBCOMMANDS = {"tools/convert.py": tuple((name,) for name in ("inspect", "import", "export", "merge", "verify"))}
# torchrun's own options come before the tool; those of the word after them are not looked at.
_COMMAND = re.compile(r"(?:^|[|;&]\s*)(?:[A-Z_]+=\S+ )*(?:python3?|torchrun)\b[^|]*?\b((?:tools|samples)/\w+\.py)(.*)$")
_OTHER = re.compile(r"(make|curl|sbatch|srun|torchrun|python3?|pip|git|bash|sh|docker|source) |[\w./]+/bin/")


class Command(NamedTuple):
    """A line of a page that calls a program of ours. words: those behind the program."""

    page: Path
    line: int
    program: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def indented_lines(page: str) -> Iterator[tuple[int, str]]:
    """What stands in code blocks, continued lines joined."""
    text, begin, is_fenced = "", 0, False
    for number, line in enumerate(page.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            begin = begin if text else number
            text += line.strip()
            if text.endswith("\\"):
                text = text[:-1]
                continue
            yield begin, text
        text = ""


def commands(page: Path) -> Iterator[Command]:
    return commands_in(page.read_text(encoding="utf-8"), page)


def commands_in(text: str, page: Path) -> Iterator[Command]:
    for number, line in indented_lines(text):
        found = _COMMAND.search(line.removeprefix("$ ").strip("`"))
        if found:
            shown = re.sub(r"(\s{2,}\S.*|\s#.*|\s2?>.*|;.*|\|.*)$", "", found[2])  # remarks, redirections, what follows
            words = shlex.split(re.sub(r"[\[\]]|\.\.\.|…", "", shown))
            yield Command(page, number, found[1], tuple(words))


def recipe_commands(recipe: Path) -> list[Command]:
    """Those of the remarks at the head of a recipe."""
    lines = [line[2:] for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return list(commands_in("\n".join(f"  {line}" for line in lines), recipe))


def others(page: Path) -> Iterator[tuple[int, str]]:
    """Lines of code blocks that call a program which is not ours: what stands up to a remark."""
    for number, line in indented_lines(page.read_text(encoding="utf-8")):
        typed = line.removeprefix("$ ").strip("`")
        if _OTHER.match(typed) and not _COMMAND.search(typed):
            yield number, re.sub(r"\s+#.*$|\s{2,}\S.*$", "", typed)


def check(command: Command) -> None:
    """Have its tool read it, and do nothing. Raises InputError."""
    _start(command.program, [str(ROOT / word) if word.startswith("configs/") else word for word in command.words])


def options_of(program: str) -> set[str]:
    """Names of its options, short ones too."""
    return set().union(*(_start(program, words) for words in SUBCOMMANDS.get(program, ((),))))


def _start(program: str, words: Sequence[str]) -> set[str]:
    """Start a tool, which does no more than read its words; the names of its options."""
    names: set[str] = set()

    def only_parse(
        job: Any,
        config_class: type,
        aliases: dict[str, str] | None = None,
        default_config: Path | None = None,
        argv: Sequence[str] | None = None,
    ) -> None:
        parse(config_class, words if argv is None else argv, program, aliases, default_config)
        names.update(aliases or (), (name for name, _ in _leaf_fields(config_class)))

    with mock.patch("engine.launch.run", only_parse), mock.patch.object(sys, "argv", [program, *words]):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert names, f"{program} has not called run"
    return names
