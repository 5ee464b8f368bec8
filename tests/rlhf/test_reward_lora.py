"""A reward model that is adapters and a head: what it learns, what it leaves, and who can read it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from engine.conversion import merge_model
from engine.dry_run import PlanConfig
from engine.job import TrainConfig
from engine.loggers import read_rows
from engine.loop import CheckpointConfig, EvalConfig
from engine.lora import LoraConfig
from engine.manifest import stored_tensors
from engine.optim import OptimConfig
from model.chat import Message
from model.fingerprint import fingerprint_weights
from model.hf import load_config, read_model
from rlhf.answer_judge import AnswerJudge
from rlhf.ppo_config import RolloutConfig
from rlhf.ppo_job import train_ppo
from rlhf.reward_job import RmConfig, rm
from rlhf.reward_model import open_reward_model
from tests.engine.random_kills import check_that_kills_leave_no_trace
from tests.ranks import PATIENCE, start_ranks
from tests.rlhf.planted import write_comparisons
from tests.rlhf.small_ppo import small_recipe
from tests.rlhf.small_reward import write_small_sft
from tests.rlhf.test_reward_job import CONTEXT, recipe, written
from tests.small_base import write_small_conversations

RANK = {"lora": LoraConfig(rank=4), "optim": OptimConfig(lr=1e-2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SFT model, comparisons of four answers, and held-out ones."""
    folder = tmp_path_factory.mktemp("planted")
    write_small_sft(folder / "sft", CONTEXT)
    write_comparisons(folder / "held.jsonl", 100, 4, first=10_000)
    write_comparisons(folder / "4.jsonl", 100, 4)
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    rm(recipe(folder, folder / "rm", **RANK))
    return folder / "rm"


def looks(directory: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(directory / "metrics.jsonl") if "held_out_loss" in row]


def test_it_finds_the_planted_reward_and_leaves_an_adapter_with_its_head(folder: Path, made: Path) -> None:
    assert json.loads((made / "report.json").read_text())["accuracy"][0] > 0.8
    facts = json.loads((made / "adapter_config.json").read_text())
    assert (facts["task_type"], facts["modules_to_save"], facts["r"]) == ("SEQ_CLS", ["score"], 4)
    stored = load_file(made / "adapter_model.safetensors")
    assert len(stored) == 2 * 7 * 2 + 1 and stored["base_model.model.score.weight"].shape == (1, 24)
    assert not list(made.glob("model*.safetensors")) and not (made / "config.json").exists()
    base = dict(read_model(folder / "sft", load_config(folder / "sft")))
    same = {
        name
        for name, tensor in read_model(made, load_config(made))
        if name in base and torch.equal(tensor.float(), base[name])
    }
    assert same == {name for name in base if "norm" in name or "embed" in name}, "of the rest base and adapter are one"


def test_before_its_first_step_it_judges_as_the_model_does_all_of_whose_weights_are_trained(
    folder: Path, tmp_path: Path
) -> None:
    options = {"eval": EvalConfig(data=[str(folder / "held.jsonl")], every=1), "train": TrainConfig(steps=1)}
    rm(recipe(folder, tmp_path / "whole", **options))
    rm(recipe(folder, tmp_path / "adapted", **options, **RANK))
    whole, adapted = looks(tmp_path / "whole"), looks(tmp_path / "adapted")
    for name in ("held_out_loss", "held_out_accuracy", "held_out_margin"):
        assert whole[0][name] == adapted[0][name]
    assert whole[1]["held_out_loss"] != adapted[1]["held_out_loss"]


@torch.no_grad()
def test_peft_gives_the_scores_that_the_directory_is_normalised_by(folder: Path, made: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    opened = open_reward_model(made)
    assert opened.std != 1 and opened.config.score_std == opened.std
    base = AutoModelForSequenceClassification.from_pretrained(folder / "sft", num_labels=1, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, made).eval()
    ids, grades = written(made, folder / "held.jsonl")
    raw = torch.cat([theirs(row[None]).logits[0] for row in ids]).double()
    best = [max(range(4), key=lambda place: grades[first + place]) + first for first in range(0, 400, 4)]
    scores = opened.normalise(raw[best])
    assert abs(scores.mean()) < 1e-5 and abs(scores.std(correction=0) - 1) < 1e-5


def test_it_is_trained_further_by_adapters_on_top_of_it_or_as_a_whole(folder: Path, made: Path, tmp_path: Path) -> None:
    """Head, scores and all: before the first step it judges as it did."""
    before, own = looks(made)[-1], fingerprint_weights(made)
    once = {"eval": EvalConfig(data=[str(folder / "held.jsonl")], every=1), "train": TrainConfig(steps=1)}
    for name, how in (("more", RANK), ("whole", {})):
        rm(recipe(folder, tmp_path / name, model=str(made), **once, **how))
        first, last = looks(tmp_path / name)
        assert first["held_out_loss"] == pytest.approx(before["held_out_loss"], rel=1e-6)
        assert first["held_out_accuracy"] == pytest.approx(before["held_out_accuracy"], abs=1e-6)
        assert last["held_out_loss"] != first["held_out_loss"]
    assert fingerprint_weights(made) == own
    facts = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == str(made)


def test_ppo_and_evaluation_are_judged_by_it_as_by_the_merged_model(folder: Path, made: Path, tmp_path: Path) -> None:
    merge_model(made, tmp_path / "merged", "float32")
    answers = [((Message("user", "头晕怎么办？"),), "注意休息。"), ((Message("user", "咳嗽？"),), "定期复查，乏力。")]
    rewards = {}
    for name in (made, tmp_path / "merged"):
        rewards[name] = AnswerJudge(name, torch.device("cpu"), torch.float32)(answers)
    assert rewards[made] == pytest.approx(rewards[tmp_path / "merged"], abs=1e-5)

    write_small_conversations(tmp_path / "chats.jsonl", 12)
    config = small_recipe(folder, out=str(tmp_path / "ppo"), rollout=RolloutConfig(prompts=2, max_new_tokens=2))
    config.data.paths = [str(tmp_path / "chats.jsonl")]
    config.eval.fraction, config.train.steps, config.train.micro_batch_tokens = 0.0, 1, 256
    config.log.tensorboard = config.log.curves = False
    found = []
    for source in (made, tmp_path / "merged"):
        config = dataclasses.replace(config, out=str(tmp_path / f"ppo-of-{source.name}"))
        config.reward.source = str(source)
        train_ppo(config)
        found += [row["objective/reward_mean"] for row in read_rows(Path(config.out) / "metrics.jsonl")][:1]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_two_processes_make_the_adapters_that_one_makes(folder: Path, made: Path, tmp_path: Path) -> None:
    for process in (processes := start_ranks(rm, 2, recipe(folder, tmp_path / "rm", **RANK))):
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (load_file(directory / "adapter_model.safetensors") for directory in (made, tmp_path / "rm"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(two[name], value, atol=1e-4) for name, value in one.items())
    first, second = (load_config(directory) for directory in (made, tmp_path / "rm"))
    assert (second.score_mean, second.score_std) == pytest.approx((first.score_mean, first.score_std), rel=1e-4)


def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(folder: Path, tmp_path: Path) -> None:
    def config(out: Path) -> RmConfig:
        return recipe(
            folder,
            out,
            lora=LoraConfig(rank=3, dropout=0.1),
            train=TrainConfig(steps=40, micro_batch_tokens=512, batch_tokens=1024),
            checkpoint=CheckpointConfig(every=3, keep=2),
            eval=EvalConfig(data=[str(folder / "held.jsonl")], every=20),
        )

    check_that_kills_leave_no_trace(rm, config, tmp_path, world=2, kills=4)
    for name in ("adapter_config.json", "adapted_config.json", "report.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    stored = stored_tensors(tmp_path / "killed" / "state" / "step-00000040")
    kinds = {name.rpartition(".")[2] for name in stored if name.startswith("model.")}
    assert kinds == {"lora_a", "lora_b", "weight"} and "model.score.weight" in stored
    assert not any("embed_tokens" in name for name in stored)


def test_adapters_learn_at_ten_times_the_rate_of_all_weights(folder: Path, tmp_path: Path) -> None:
    for name, how, rate in (("whole", {}, 1e-5), ("adapted", {"lora": LoraConfig(rank=4)}, 1e-4)):
        rm(recipe(folder, tmp_path / name, train=TrainConfig(steps=1), optim=OptimConfig(), **how))
        assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["optim"]["lr"] == pytest.approx(rate)


def test_one_80_gb_card_will_do_for_13b_as_the_page_says(capsys: pytest.CaptureFixture) -> None:
    rm(RmConfig(model="ziya2-13b", lora=LoraConfig(rank=16), dry_run=True, plan=PlanConfig(1, 79.1)))
    shown = capsys.readouterr().out
    (fits,) = (line for line in shown.splitlines() if "it fits the 79.1 GiB that are there" in line)
    assert fits in (Path(__file__).parents[2] / "docs/rm.md").read_text()
    # Two bytes a weight but for the head, a row of d; for each layer 4 adapters on d, d and 3 on d, F.
    lines = dict(line.split()[:2] for line in shown.splitlines() if line.startswith("  "))
    trained = 5120 + 40 * 16 * (8 * 5120 + 3 * (5120 + 13824))
    assert f"adapters of rank 16: {trained:,} are trained" in shown
    assert float(lines["frozen"]) == pytest.approx(2 * (12_890_040_320 - 5120) / 2**30, abs=0.005)
    assert float(lines["adapters"]) == pytest.approx(4 * trained / 2**30, abs=0.005)
