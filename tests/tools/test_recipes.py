"""Every shipped recipe says where it fits by the name of its folder, and is held to it."""

import re
from pathlib import Path

import pytest

from tests.tools.in_child import TOOLS, run_tool

CONFIGS = TOOLS.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*/*/*.yaml"))
JOBS = {"pretrain", "sft", "rm", "ppo", "rejection", "dpo"}
GIB = {"80gb": 79.1, "141gb": 139.0}  # what torch sees of a card of that name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_fits_the_cards_that_it_is_for(recipe: Path, tmp_path: Path) -> None:
    model, cards, job = recipe.parts[-3], recipe.parts[-2], recipe.stem
    count, size = re.fullmatch(r"(\d+)x(\d+gb)", cards).groups()  # type: ignore[union-attr]
    (tmp_path / "corpus.txt").write_text("感冒多由病毒引起。\n" * 50, encoding="utf-8")
    data = ("--data", "corpus.txt") if job == "pretrain" else ()
    node = ("--plan.world", count, "--plan.device_gib", GIB[size])
    (ended,) = run_tool(job, "--dry-run", "--model", model, "--config", recipe, *data, *node, cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    assert ended.stdout.count("it fits the") == (2 if job == "rejection" else 1)
    assert "does not fit" not in ended.stdout


@pytest.mark.parametrize("folder", sorted({recipe.parent for recipe in RECIPES}), ids=lambda path: path.parts[-2:])
def test_every_stage_has_a_recipe_that_names_its_own_command(folder: Path) -> None:
    assert {recipe.stem for recipe in folder.glob("*.yaml")} == JOBS
    for recipe in folder.glob("*.yaml"):
        text = recipe.read_text(encoding="utf-8")
        assert f"tools/{recipe.stem}.py --config {recipe.relative_to(CONFIGS.parent)}" in text
        assert f"out: ckpt/{recipe.stem}\n" in text
