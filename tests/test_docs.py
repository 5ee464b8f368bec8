"""The documentation holds: its commands parse, its links lead somewhere, the options and files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documented import PAGES, RECIPES, ROOT, Command, check, commands, indented_lines, options_of, recipe_commands

COMMANDS = [command for page in PAGES for command in commands(page) if command.program != "samples/render.py"]
# argparse, which the doctor takes as it must run without packages.
PARSED = [command for command in COMMANDS if command.program != "tools/doctor.py"]
LAUNCHED = re.compile(r"^from engine.launch import .*\brun\b", re.MULTILINE)
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if LAUNCHED.search(path.read_text(encoding="utf-8")))
# Options of programs that are not ours, where a page speaks of them.
FOREIGN = {"shutdown-timeout", "signals-to-handle", "nproc-per-node", "nnodes", "ipc", "shm-size", "gpus"}


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", PARSED, ids=str)
def test_a_command_is_one_that_its_tool_accepts(command: Command) -> None:
    check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, f"{page.name} links to {target}{anchor}"
    for name in re.findall(r"`((?:kernels|model|engine|rlhf|evals|tools|samples|tests|configs|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = [line for _, line in indented_lines(text)] + re.findall(r"`([^`]*)`", text)
    for target in {found for line in shown for found in re.findall(r"^(?:\$ )?make ([\w-]+)(?![\w*-])", line)}:
        assert target in targets, f"{page.name} says make {target}"


def test_every_option_that_a_page_names_is_one_of_some_tool() -> None:
    names = set().union(*(options_of(f"tools/{tool.name}") for tool in TOOLS))
    groups = {name.rsplit(".", 1)[0] for name in names}
    known = FOREIGN | {"config", "help", "print_config"} | names | groups | {name.replace("_", "-") for name in names}
    named = {
        (page.name, option.rstrip("."))
        for page in PAGES
        if page.name != "errors.md"  # options that there are not; each of its rows is played by a test
        for option in re.findall(r"`--([a-z][\w.-]*)", page.read_text(encoding="utf-8"))
    }
    assert {(page, option) for page, option in named if option not in known} == set()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_command_at_the_head_of_a_recipe_is_one_that_its_tool_accepts(recipe: Path) -> None:
    found = recipe_commands(recipe)
    assert bool(found) != recipe.stem.startswith("demo_")
    for command in found:
        check(command)
