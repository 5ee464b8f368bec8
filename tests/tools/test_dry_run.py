"""--dry-run says what a run would need and do, for any model and number of processes, and leaves no trace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from engine.loggers import read_rows
from model.config import PRESETS
from samples.knowledge import load_knowledge
from samples.render import render_pretraining
from tests.small_base import small_texts
from tests.tools.in_child import TOOLS, Ended, run_tool
from tests.tools.small_job import pretrain, write_small_job

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_job(tmp_path_factory.mktemp("job"))


def everything(folder: Path) -> set[tuple[str, int]]:
    """Every path below a folder and when it changed, but for what processes said."""
    paths = (path for path in folder.rglob("*") if ".said" not in str(path))
    return {(str(path), path.stat().st_mtime_ns) for path in paths}


def dry_run(folder: Path, *words: object) -> Ended:
    earlier = everything(folder)
    (ended,) = run_tool("pretrain", "--dry-run", *words, cwd=folder)
    assert ended.code == 0, ended.stderr
    assert everything(folder) == earlier
    return ended


def at_rest(plan: str, category: str) -> float:
    """GiB that a category holds between steps."""
    found = re.search(rf"^  {category} +([\d.]+)", plan, re.MULTILINE)
    assert found is not None, plan
    return float(found[1])


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_planned_for_any_number_of_processes_without_a_gpu(
    folder: Path, preset: str, world: int
) -> None:
    plan = dry_run(folder, "--model", preset, "--data", "data.jsonl", "--plan.world", world).stdout
    parameters = PRESETS[preset].num_parameters
    assert f"{preset}: {parameters:,} parameters" in plan
    # fp32 masters, fp32 gradients and two fp32 moments, each shared out evenly.
    for category, bytes_each in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
        assert at_rest(plan, category) == pytest.approx(bytes_each * parameters / world / GIB, abs=0.006)
    assert re.search(rf"^memory of a rank: {world} process", plan, re.MULTILINE)
    assert re.search(r"^A rank needs [\d.]+ GiB", plan, re.MULTILINE)


def test_without_data_the_bundled_sample_is_shown_and_no_file_is_written(tmp_path: Path) -> None:
    recipe = yaml.safe_load((TOOLS.parent / "configs" / "demo_pretrain.yaml").read_text(encoding="utf-8"))["train"]
    shown = dry_run(tmp_path).stdout
    assert f"tiny: {PRESETS['tiny'].num_parameters:,} parameters" in shown
    assert f"{recipe['steps']:,} steps of {recipe['batch_tokens']:,} tokens" in shown
    first = render_pretraining(load_knowledge())[0][0].text
    assert f"trained tokens marked:\n<bos>⟦{first[:100]}" in shown


def test_a_larger_preset_takes_nothing_but_the_sample_from_the_bundled_recipe(tmp_path: Path) -> None:
    shown = dry_run(tmp_path, "--model", "7b", "--plan.world", 8).stdout
    assert f"steps of {16 * 4096:,} tokens" in shown
    assert "Learning rate at step 1: 3.00e-04" in shown  # that of Llama 2 at this width


def test_the_schedule_is_the_one_that_the_run_follows(folder: Path) -> None:
    pretrain(folder, "run", "--train.steps", 12)
    planned = dry_run(folder, "--config", "recipe.yaml", "--train.steps", 12).stdout
    assert "12 steps of 256 tokens, 3,072 in all." in planned
    points = re.search(r"Learning rate at step (.+)\.", planned)
    assert points is not None
    followed = {row["step"]: f"{row['lr']:.2e}" for row in read_rows(folder / "run" / "metrics.jsonl") if "lr" in row}
    told = dict(point.split(": ") for point in points[1].split(", "))
    assert len(told) >= 5 and {"1", "12"} <= told.keys()
    assert {int(step): rate for step, rate in told.items()}.items() <= followed.items()


def test_the_sample_is_a_document_as_it_is_trained(folder: Path) -> None:
    shown = dry_run(folder, "--config", "recipe.yaml").stdout
    first = small_texts()[0]
    assert len(first) < 32, "a document that the context does not cut"
    assert f"trained tokens marked:\n<bos>⟦{first}<eos>⟧\n" in shown


def test_tokens_of_prepared_data_are_counted_and_give_the_steps_of_an_epoch(folder: Path) -> None:
    (ended,) = run_tool(*("prepare", "--data", "data.jsonl", "--tokenizer", "base", "--out", "prepared"), cwd=folder)
    counted = re.search(r"tokens +([\d,]+)", ended.stdout)
    assert ended.code == 0 and counted is not None
    tokens = int(counted[1].replace(",", ""))
    shown = dry_run(folder, "--model", "base", "--data", "prepared", "--train.batch_tokens", 1024).stdout
    assert f"data: {tokens:,} tokens" in shown
    assert f"{-(-tokens // 1024)} steps of 1,024 tokens" in shown


def test_what_is_advised_for_a_model_that_does_not_fit_makes_it_fit(folder: Path) -> None:
    card = ("--model", "7b", "--data", "data.jsonl", "--plan.device_gib", 79.1)
    plan = dry_run(folder, *card, "--plan.world", 1).stdout
    assert "it does not fit" in plan
    advised = re.search(r"Any of these makes it fit:\n  on (\d+) processes", plan)
    assert advised is not None, plan
    assert "it fits" in dry_run(folder, *card, "--plan.world", advised[1]).stdout


CONFIGS = TOOLS.parent / "configs"
NODE = ("--plan.world", 8, "--plan.device_gib", 79.1)


def plan_preset(job: str, folder: Path, *words: object) -> str:
    """The plan of the 13B preset by its recipe on eight cards; no data is needed, and nothing is written."""
    recipe = CONFIGS / "ziya2-13b" / "8x80gb" / f"{job}.yaml"
    (ended,) = run_tool(job, "--dry-run", "--model", "ziya2-13b", "--config", recipe, *NODE, *words, cwd=folder)
    assert ended.code == 0, ended.stderr
    assert everything(folder) == set()
    return ended.stdout


@pytest.mark.parametrize("job", ["sft", "rm", "dpo", "rejection"])
def test_a_preset_is_planned_for_every_job_before_anybody_has_downloaded_it(tmp_path: Path, job: str) -> None:
    sizes = ("--train.micro_batch_tokens", 8192, "--train.recompute", "selective")
    ended = run_tool(job, "--dry-run", "--model", "ziya2-13b", *NODE, *sizes, cwd=tmp_path)[0]
    assert ended.code == 0, ended.stderr
    parameters = 12_890_040_320 if job == "rm" else 13_091_886_080  # a head of one number, and no other
    assert f"ziya2-13b: {parameters:,} parameters" in ended.stdout
    assert "it fits the 79.1 GiB that are there" in ended.stdout
    assert ("keys and values" in ended.stdout) == (job == "rejection")
    assert everything(tmp_path) == set()


def test_the_13b_recipe_of_ppo_fits_eight_h100_with_room_for_24_000_cached_tokens_a_rank(tmp_path: Path) -> None:
    plan = plan_preset("ppo", tmp_path)
    assert "it fits the 79.1 GiB that are there" in plan
    room = re.search(r"room for ([\d,]+) cached tokens a rank", plan)
    assert room is not None and int(room[1].replace(",", "")) >= 24_000
    header = "rollout scores old logprobs reference values policy update critic update"
    assert plan.splitlines()[2].split() == ["GiB", *header.split()]
    for held in ("policy: fp32 weights", "policy: moments", "critic: fp32 weights", "critic: moments"):
        assert re.search(rf"^  {held} .*\d\.\d\d", plan, re.MULTILINE), held
    for held in ("reference, frozen", "reward, frozen", "generator, whole", "keys and values"):
        assert re.search(rf"^  {held} .*\d\.\d\d", plan, re.MULTILINE), held


def test_the_documented_plan_of_ppo_is_that_of_the_recipe(tmp_path: Path) -> None:
    page = (CONFIGS.parent / "docs" / "memory.md").read_text(encoding="utf-8")
    plan = plan_preset("ppo", tmp_path)
    assert "".join(f"    {line}\n" for line in plan.splitlines()) in page


def test_what_is_advised_for_ppo_that_does_not_fit_makes_it_fit(tmp_path: Path) -> None:
    large = ("--train.recompute", "none", "--train.micro_batch_tokens", 16384)
    plan = plan_preset("ppo", tmp_path, *large)
    assert "it does not fit" in plan
    assert "  --train.recompute full  (" in plan
    assert "it fits" in plan_preset("ppo", tmp_path, *large, "--train.recompute", "full")


def test_a_mistake_is_found_before_the_run(folder: Path) -> None:
    (ended,) = run_tool("pretrain", "--dry-run", "--data", "dota.jsonl", cwd=folder)
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.last_line == "dota.jsonl: no such file or directory. Check the path after --data."
