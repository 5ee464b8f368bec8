"""Command lines and recipes: precedence, lists, and one clear sentence for every mistake."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from engine.config import changes, parse, to_yaml
from model.errors import InputError


@dataclass
class Data:
    paths: list[str] = field(default_factory=list)
    """Files, folders or globs."""
    weights: list[float] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)


@dataclass
class Train:
    steps: int | None = None
    lr: float = 1e-3
    kind: Literal["cosine", "linear"] = "cosine"


@dataclass
class Recipe:
    """A recipe for these tests."""

    model: str = "tiny"
    dry_run: bool = False
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)


def read(*argv: str, default: Path | None = None) -> Recipe:
    return parse(Recipe, argv, "recipe", {"data": "data.paths"}, default)


def test_flags_override_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    beneath, recipe = tmp_path / "beneath.yaml", tmp_path / "recipe.yaml"
    beneath.write_text("model: big\ntrain:\n  steps: 1\n  lr: 0.5\n")
    recipe.write_text("train:\n  steps: 2\n  kind: linear\n")
    config = read("--config", str(recipe), "--train.steps", "3", default=beneath)
    assert config == Recipe(model="big", train=Train(steps=3, lr=0.5, kind="linear"))


def test_list_options_take_several_words_and_pairs_make_a_mapping() -> None:
    config = read("--data", "a b.txt", "c*.jsonl", "--data.weights", "1", "0.5", "--data.keys", "user=ask", "bot=a")
    assert config.data == Data(paths=["a b.txt", "c*.jsonl"], weights=[1.0, 0.5], keys={"user": "ask", "bot": "a"})


def test_a_list_may_be_emptied_and_one_of_a_file_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  paths: [a.txt]\n")
    assert read("--config", str(recipe), "--data", "[]").data == Data()


def test_no_words_give_the_defaults() -> None:
    assert read() == Recipe()


def test_a_switch_needs_no_value_and_may_be_written_with_a_dash() -> None:
    assert read("--dry-run", "--model", "7b") == Recipe(model="7b", dry_run=True)


def test_the_printed_recipe_reads_back_the_same(tmp_path: Path) -> None:
    config = read("--data", "中文.txt", "--train.lr", "1e-5")
    (tmp_path / "saved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert read("--config", str(tmp_path / "saved.yaml")) == config


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.stepz", "3"], "--train.stepz is not an option. Did you mean --train.steps?"),
        (["--dat", "a"], "--dat is not an option. Did you mean --data?"),
        (["--train.st", "3"], "--train.st is not an option. Did you mean --train.steps?"),
        (["--train", "3"], "--train is not an option. Did you mean --train.lr?"),
        (["--steps", "3"], "--steps is not an option. Did you mean --train.steps?"),
        (["--train.steps", "many"], "--train.steps: 'many' is not a whole number or null."),
        (["--train.kind", "square"], "--train.kind: 'square' is not one of cosine, linear."),
        (["--train.lr", "1e-3", "2e-3"], "--train.lr takes one value, not 2. Give it a number."),
        (["--data"], "--data is given no value. Name some, or leave it out."),
        (["--data", "--train.steps", "3"], "--data is given no value. Name some, or leave it out."),
        (["--data", "a.txt", ""], "--data is given an empty value. Name some, or leave it out."),
        (["--data.weights="], "--data.weights is given an empty value. Name some, or leave it out."),
        (["--data.weights", "heavy"], "--data.weights: 'heavy' is not a number."),
        (["--data.keys", "user"], "--data.keys takes name=value pairs"),
        (["--config"], "--config takes one YAML file."),
        (["stray"], "'stray' stands alone."),
        (["--config", "missing.yaml"], "missing.yaml: there is no such recipe."),
    ],
)
def test_a_wrong_option_is_one_sentence_with_a_remedy(argv: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(*argv)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  stepz: 3\n", "recipe.yaml:2: train.stepz is not an option. Did you mean --train.steps?"),
        ("train: 3\n", "train is a group of options, not 3."),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("train:\n  steps: [1\n", "recipe.yaml:3: not readable as YAML"),
        ("train:\n  steps: soon\n", "recipe.yaml:2: train.steps: 'soon' is not a whole number or null."),
    ],
)
def test_a_wrong_recipe_is_one_sentence_with_a_remedy(tmp_path: Path, text: str, said: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(InputError) as caught:
        read("--config", str(recipe))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changes_of_a_saved_recipe_are_named() -> None:
    saved = to_yaml(read("--train.steps", "100", "--data", "a"))
    assert changes(saved, read("--train.steps", "100", "--data", "a")) == []
    changed = changes(saved, read("--train.steps", "200", "--data", "a", "--train.lr", "0.5"))
    assert changed == ["train.steps 100 -> 200", "train.lr 0.001 -> 0.5"]


def test_help_shows_every_option_and_its_short_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read("--help")
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--data VALUE the same as --data.paths" in shown
    assert "--data.paths" in shown and "Files, folders or globs." in shown
    assert "--train.kind {cosine,linear}" in shown
    assert "--data.paths+" not in shown and "bundled demo" not in shown
    assert "--train VALUE" not in shown and "configuration file" not in shown


def test_help_says_whose_defaults_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo.yaml").write_text("train:\n  steps: 7\n")
    with pytest.raises(SystemExit):
        read("--help", default=tmp_path / "demo.yaml")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"those of the bundled demo ({tmp_path.name}/demo.yaml), which do not apply where --data is given" in shown
    assert "default: 7" in shown
