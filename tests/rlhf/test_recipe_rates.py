"""Which training a recipe's learning rates are of, where the command line asks for adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from engine.config import parse, to_yaml
from engine.lora import adapter_rate
from engine.sft import SftConfig
from model.config import PRESETS
from rlhf.ppo_config import LEARNING_RATE, VALUE_LEARNING_RATE, PpoConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

RATES = "optim:\n  lr: 2.0e-4\nvalue:\n  lr: 1.0e-3\n"


def read(recipe: Path, *words: str) -> PpoConfig:
    return parse(PpoConfig, ("--config", str(recipe), *words), "ppo.py")


def rates(config: PpoConfig) -> tuple[float | None, float | None]:
    resolved = config.with_rates()
    return resolved.optim.lr, resolved.value.lr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RATES)
    return tmp_path / "recipe.yaml"


def test_adapters_take_ten_times_the_rates_that_a_recipe_names_for_all_weights(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rates(read(recipe)) == (2e-4, 1e-3)
    assert capsys.readouterr().err == ""
    assert rates(read(recipe, "--lora.rank", "8")) == pytest.approx((2e-3, 1e-2))
    assert "optim.lr 0.0002 is for all weights" in capsys.readouterr().err
    beneath = parse(PpoConfig, ("--lora.rank", "8"), "ppo.py", default_config=recipe)
    assert rates(beneath) == pytest.approx((2e-3, 1e-2))


def test_what_the_command_line_names_holds_as_it_stands(recipe: Path) -> None:
    config = read(recipe, "--lora.rank", "8", "--optim.lr", "2e-4")
    assert rates(config) == (2e-4, pytest.approx(1e-2))
    assert rates(read(recipe, "--lora.rank", "8", "--optim.lr", "3e-4", "--value.lr", "4e-4")) == (3e-4, 4e-4)


def test_what_a_recipe_with_a_rank_names_is_of_adapters(recipe: Path) -> None:
    recipe.write_text(RATES + "lora:\n  rank: 4\n")
    assert rates(read(recipe)) == (2e-4, 1e-3)
    assert rates(read(recipe, "--lora.rank", "16")) == (2e-4, 1e-3)


def test_all_weights_do_not_take_what_a_recipe_names_for_adapters(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RATES + "lora:\n  rank: 4\n")
    assert rates(read(recipe, "--lora.rank", "0")) == (LEARNING_RATE, VALUE_LEARNING_RATE)
    assert "optim.lr 0.0002 is for adapters" in capsys.readouterr().err
    assert rates(read(recipe, "--lora.rank", "0", "--optim.lr", "3e-6")) == (3e-6, VALUE_LEARNING_RATE)


def test_a_run_that_is_repeated_from_its_own_recipe_has_the_same_rates(recipe: Path) -> None:
    """The recipe of a run of all weights names a rank, too: 0."""
    for words, times in (((), 10), (("--lora.rank", "8"), 1)):
        run = read(recipe, *words).with_rates()
        saved = recipe.with_name("config.yaml")
        saved.write_text(to_yaml(run))
        assert rates(read(saved)) == (run.optim.lr, run.value.lr)
        adapted = rates(read(saved, "--lora.rank", "8"))
        assert adapted == pytest.approx(tuple(times * rate for rate in rates(run)))  # type: ignore[operator]


def test_a_recipe_without_rates_leaves_them_to_the_job(recipe: Path) -> None:
    recipe.write_text("train:\n  steps: 2\n")
    assert rates(read(recipe, "--lora.rank", "8")) == pytest.approx((1e-5, 9e-5))
    assert dataclasses.asdict(read(recipe, "--lora.rank", "8"))["lora"].keys() == {
        *("rank", "alpha", "dropout", "rslora", "targets", "train_embeddings")
    }


@pytest.mark.parametrize(("recipe", "model", "rate"), [("7b/8x80gb/sft", "7b", 3e-4), ("demo_sft", "tiny", 2e-3)])
def test_adapters_of_fine_tuning_take_their_own_rate_or_the_recipes_where_that_is_more(
    recipe: str, model: str, rate: float
) -> None:
    words = ("--config", str(CONFIGS / f"{recipe}.yaml"), "--lora.rank", "8")
    config = parse(SftConfig, words, "sft.py")
    assert config.optim.lr is None and adapter_rate(PRESETS[model], config.lora) == rate
