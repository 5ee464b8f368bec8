"""DPO of adapters: the frozen weights are the reference, and nothing else is ever loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.data.ranked_loader import evaluation_ranked_batches
from engine.dry_run import PlanConfig
from engine.job import TrainConfig
from engine.loop import CheckpointConfig, EvalConfig
from engine.lora import LoraConfig
from engine.mesh import stop
from engine.optim import OptimConfig
from engine.preferences import PreferenceDataConfig, open_preferences
from model.chat import ChatTemplate
from model.errors import InputError
from model.fingerprint import fingerprint_weights
from model.heads import CausalLM
from model.lora import adapters_off
from model.tokenizer import Tokenizer
from rlhf import dpo_job
from rlhf.dpo import sequence_logprobs
from rlhf.dpo_job import DpoConfig, dpo
from tests.engine.random_kills import check_that_kills_leave_no_trace
from tests.ranks import PATIENCE, start_ranks
from tests.rlhf.planted import write_comparisons
from tests.rlhf.small_reward import write_small_sft
from tests.rlhf.test_dpo_job import CONTEXT, LN2, PACK, recipe, rows
from tests.small_adapter import write_small_adapter

RANK = {"lora": LoraConfig(rank=4), "optim": OptimConfig(lr=1e-2, beta2=0.999, weight_decay=0.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SFT model, an adapter of it with tokenizer and template, and comparisons of three answers."""
    folder = tmp_path_factory.mktemp("planted")
    write_small_sft(folder / "sft", CONTEXT)
    adapter = write_small_adapter(folder / "adapted", folder / "sft")
    tokenizer = Tokenizer.load(folder / "sft")
    ChatTemplate.named("chimed", tokenizer).store(tokenizer).save(adapter)
    write_comparisons(folder / "held.jsonl", 40, 3, first=10_000)
    write_comparisons(folder / "train.jsonl", 100, 3)
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    dpo(recipe(folder, folder / "dpo", **RANK))
    return folder / "dpo"


def references(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: load_file(directory / "reference" / f"{name}.safetensors")["logprob"] for name in ("train", "held-out")
    }


def test_it_begins_at_ln_2_and_learns_which_answers_are_better(folder: Path, made: Path) -> None:
    steps, looks = rows(made)
    for row, prefix in ((steps[0], ""), (looks[0], "held_out_")):
        assert row[f"{prefix}loss"] == pytest.approx(LN2, rel=2**-22)
        assert row[f"{prefix}rewards/chosen"] == row[f"{prefix}rewards/rejected"] == 0.0
    assert looks[-1]["held_out_loss"] < 0.9 * LN2 and looks[-1]["held_out_rewards/accuracies"] > 0.75
    facts = json.loads((made / "adapter_config.json").read_text())
    assert (facts["task_type"], facts["modules_to_save"]) == ("CAUSAL_LM", None)
    assert facts["base_model_name_or_path"] == str(folder / "sft")
    assert len(load_file(made / "adapter_model.safetensors")) == 2 * 7 * 2


@pytest.mark.parametrize("model", ["sft", "adapted"])
def test_the_reference_is_the_frozen_weights_to_the_bit_and_is_no_second_model(
    model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As training of all weights reads it; and as the trained model, its adapters off, still gives it."""
    built: list[CausalLM] = []
    is_on: list[bool] = []

    class Counted(CausalLM):
        def __init__(self, *arguments: Any) -> None:
            built.append(self)
            super().__init__(*arguments)

        def forward(self, *arguments: Any, **options: Any) -> Any:
            terms = [module.low_rank for module in self.modules() if getattr(module, "low_rank", None) is not None]
            is_on.append(all(term.is_on for term in terms))
            return super().forward(*arguments, **options)

    few = {"model": str(folder / model), "train": TrainConfig(steps=4, micro_batch_tokens=PACK)}
    before = fingerprint_weights(folder / model)
    dpo(recipe(folder, tmp_path / "whole", **few))
    monkeypatch.setattr(dpo_job, "CausalLM", Counted)
    dpo(recipe(folder, tmp_path / "dpo", **few, **RANK))
    (trained,) = built
    assert is_on == sorted(is_on) and set(is_on) == {False, True}, "off for the reference, then on"
    assert fingerprint_weights(folder / model) == before
    whole, adapted = references(tmp_path / "whole"), references(tmp_path / "dpo")
    for name, values in whole.items():
        assert torch.equal(adapted[name].nan_to_num(1.0), values.nan_to_num(1.0))

    template = ChatTemplate.of(tokenizer := Tokenizer.load(folder / "sft"))
    assert template is not None
    data = PreferenceDataConfig(paths=[str(folder / "held.jsonl")], workers=1)
    comparisons = open_preferences(data, template, tokenizer, CONTEXT, tmp_path)
    for batch in evaluation_ranked_batches(comparisons, PACK, CONTEXT):
        numbers = batch.sequence[batch.is_sequence]
        with torch.no_grad():
            moved = sequence_logprobs(trained, batch)[batch.is_sequence]
            with adapters_off(trained):
                own = sequence_logprobs(trained, batch)[batch.is_sequence]
        assert torch.equal(own, whole["held-out"][numbers]) and not torch.equal(moved, own)


def test_two_processes_make_the_adapters_that_one_makes(folder: Path, made: Path, tmp_path: Path) -> None:
    for process in (processes := start_ranks(dpo, 2, recipe(folder, tmp_path / "dpo", **RANK))):
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    (one, _), (two, looks) = rows(made), rows(tmp_path / "dpo")
    assert two[0]["rewards/chosen"] == looks[0]["held_out_rewards/margins"] == 0.0
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)
    one, two = (load_file(directory / "adapter_model.safetensors") for directory in (made, tmp_path / "dpo"))
    assert all(torch.allclose(two[name], value, atol=1e-4) for name, value in one.items())


def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(folder: Path, tmp_path: Path) -> None:
    def config(out: Path) -> DpoConfig:
        return recipe(
            folder,
            out,
            model=str(folder / "adapted"),
            lora=LoraConfig(rank=3, dropout=0.1),
            train=TrainConfig(steps=40, micro_batch_tokens=PACK, batch_tokens=2 * PACK),
            checkpoint=CheckpointConfig(every=3, keep=2),
            eval=EvalConfig(data=[str(folder / "held.jsonl")], every=20),
        )

    check_that_kills_leave_no_trace(dpo, config, tmp_path, world=2, kills=4)


def test_a_base_that_has_moved_is_the_same_base_and_another_is_refused(folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder / "sft", tmp_path / "base")
    few = {"train": TrainConfig(steps=4, micro_batch_tokens=PACK), "checkpoint": CheckpointConfig(every=2), **RANK}
    dpo(recipe(folder, tmp_path / "dpo", model=str(base), **few))
    shutil.copytree(tmp_path / "dpo", tmp_path / "unbroken")
    shutil.rmtree(tmp_path / "dpo" / "state" / "step-00000004")
    base.rename(tmp_path / "moved")
    dpo(recipe(folder, tmp_path / "dpo", model=str(tmp_path / "moved"), **few))
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("dpo", "unbroken"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    moved = {"model": str(tmp_path / "moved"), **few}
    for changes, refusal in (
        ({"model": str(folder / "adapted")}, "its adapters were trained beside weights that lay in"),
        ({"lora": LoraConfig(rank=4, alpha=3.0)}, "its checkpoint was trained with lora 'rank 4, alpha 8"),
        ({"out": str(tmp_path / "moved")}, "is read from there, and would be replaced"),
    ):
        with pytest.raises(InputError, match=refusal):
            dpo(dataclasses.replace(recipe(folder, tmp_path / "dpo", **moved), **changes))
        stop()
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == sorted(
        path.name for path in (folder / "sft").iterdir()
    )


def test_a_dry_run_says_that_the_reference_is_no_second_model(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """And as much of 13B as the page says."""
    dpo(recipe(folder, folder / "never", dry_run=True, **RANK))
    remark = "The reference is no second model: the same weights, adapters off, read all comparisons once before the"
    shown = capsys.readouterr().out
    assert remark in shown and "memory of a rank" in shown and "Learning rate at step 1" in shown
    dpo(DpoConfig(model="ziya2-13b", lora=LoraConfig(rank=16), dry_run=True, plan=PlanConfig(1, 79.1)))
    shown = capsys.readouterr().out
    (fits,) = (line for line in shown.splitlines() if "it fits the 79.1 GiB that are there" in line)
    assert remark in shown and fits in (Path(__file__).parents[2] / "docs/dpo.md").read_text()
