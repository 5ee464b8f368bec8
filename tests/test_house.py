"""The house is as docs/architecture.md says: its rooms, their imports, its files; and what no run imports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.house import MODULES, PAGE, ROOT, allowed_imports, idea, imported_modules, modules_page, names, sources

ALLOWED = allowed_imports()
ORACLES = {"transformers", "trl", "peft", "accelerate", "deepspeed", "datasets"}
# These race against transformers and TRL, or compare with them when asked to; nothing else may import them.
RACERS = {
    "tools/bench_eval.py",
    "tools/bench_generate.py",
    "tools/bench_ppo.py",
    "tools/ppo_racers.py",
    "tools/racing.py",
    "tools/train_peers.py",
    "engine/verification.py",
}
FILES = [path for room in ALLOWED for path in sources(room)]


def test_the_page_knows_every_room() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} == set(ALLOWED)


def test_a_room_stands_on_those_before_it() -> None:
    rooms = list(ALLOWED)
    for number, room in enumerate(rooms):
        assert ALLOWED[room] <= set(rooms[:number]), f"{room} imports what stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_what_the_page_allows(path: Path) -> None:
    relative = path.relative_to(ROOT)
    room = relative.parts[0]
    for line, module in imported_modules(path):
        package = module.split(".")[0]
        assert package not in ORACLES or str(relative) in RACERS, f"{relative}:{line} imports {package} at run time"
        if package in ALLOWED and package != room:
            assert package in ALLOWED[room], f"{relative}:{line}: {room} imports {package}; {PAGE.name} says otherwise"


def test_the_page_allows_no_import_that_nobody_needs() -> None:
    for room, others in ALLOWED.items():
        imported = {module.split(".")[0] for path in sources(room) for _, module in imported_modules(path)}
        assert others <= imported, f"{room} imports no {others - imported}"


def test_every_file_is_in_the_list_of_files_with_its_one_idea() -> None:
    assert [path for path in FILES if not idea(path)] == []
    assert MODULES.read_text(encoding="utf-8") == modules_page(), "run: make modules"


def test_every_file_and_function_that_the_page_names_is_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = re.findall(rf"((?:{'|'.join(ALLOWED)})/[\w/]*\w\.py)(?:: ([\w.]+))?", page)
    assert len(named) > 50
    for file, name in named:
        assert (ROOT / file).is_file(), file
        assert not name or name in names(ROOT / file), f"{file}: {name}"


def test_every_file_that_a_row_of_the_page_names_is_there() -> None:
    """`engine/mesh.py`, `shard.py`: a name without a folder lies beside the one before it; * stands for any letters."""
    rows = re.findall(r"^\| (`[^|]*/[^|]*`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for row in rows:
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            folder = name.rpartition("/")[0] if "/" in name else folder
            assert list(ROOT.glob(f"{folder}/{name.rpartition('/')[2]}" if name[-1] != "/" else name)), name


def test_paths_through_the_house_name_a_file_for_every_arrow() -> None:
    """In the drawings a line with an arrow ends at what comes out; between two of them a file says who did it."""
    page = PAGE.read_text(encoding="utf-8")
    drawings = [block for block in re.findall(r"(?:^    .*\n|^\n)+", page, re.MULTILINE) if "▼" in block]
    assert len(drawings) == 2
    for drawing in drawings:
        for way in drawing.split("▼")[:-1]:
            assert re.search(r"│ +\w+/[\w/]*\.py: \w+", way), way


def test_every_test_that_needs_a_gpu_is_run_by_the_command_for_them() -> None:
    _, _, rule = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ntest-gpu:")
    run = re.findall(r"\btests/\S+", rule.partition("\n\n")[0])
    for path in (ROOT / "tests").rglob("test_*.py"):
        if re.search(r"pytest\.mark\.gpu\b", path.read_text(encoding="utf-8")):
            assert any(path.is_relative_to(ROOT / of) for of in run), path
