"""What docs/architecture.md says of the house, and what stands there; `make modules` writes docs/modules.md from it.

The page is the source of truth for what rooms there are and which imports which. Every file's one idea is the first
sentence of the file itself, so the list of them is generated.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
MODULES = ROOT / "docs" / "modules.md"
_ROW = re.compile(r"^\| `(\w+)/` \| ([^|]*) \|", re.MULTILINE)
_SENTENCE = re.compile(r"(?<!et al)\.(?= |$)")
_HEAD = """# Every file and its one idea

Written by `make modules` from the first sentence of each file. How they work together: [architecture](architecture.md).
"""


def allowed_imports() -> dict[str, set[str]]:
    """The rooms, and which others each imports, as the page's table says."""
    table = PAGE.read_text(encoding="utf-8").partition("| room | imports |")[2].partition("\n\n")[0]
    return {room: set(re.findall(r"`(\w+)/`", others)) for room, others in _ROW.findall(table)}


def sources(room: str) -> list[Path]:
    """All Python files of a room."""
    return sorted((ROOT / room).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""


def idea(path: Path) -> str:
    """The first sentence of a file."""
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(document.partition("\n\n")[0].split())
    return _SENTENCE.split(paragraph)[0].replace("|", "\\|")


def names(path: Path) -> set[str]:
    """Functions and classes of a file, and methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def modules_page() -> str:
    """docs/modules.md as it should be."""
    parts = [_HEAD]
    for room in allowed_imports():
        rows = [(path, idea(path)) for path in sources(room)]
        folder = next(said for path, said in rows if path.parent == ROOT / room and path.name == "__init__.py")
        parts.append(f"\n## `{room}/`\n\n{folder}.\n\n| file | its one idea |\n|---|---|\n")
        parts += [f"| `{path.relative_to(ROOT)}` | {said} |\n" for path, said in rows if path.name != "__init__.py"]
    return "".join(parts)


if __name__ == "__main__":
    MODULES.write_text(modules_page(), encoding="utf-8")
