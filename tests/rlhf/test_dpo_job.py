"""The DPO job: it starts where the reference stands, to the bit, and learns what was planted."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlhf.reference
from engine.data.groups import PreferenceSet
from engine.data.ranked_batch import RankedBatch
from engine.data.ranked_loader import evaluation_ranked_batches
from engine.job import TrainConfig
from engine.launch import StoppedError
from engine.loggers import LogConfig, read_rows
from engine.loop import CheckpointConfig, EvalConfig
from engine.mesh import ParallelConfig, start, stop
from engine.optim import OptimConfig
from engine.preferences import PreferenceDataConfig, open_preferences
from engine.signals import StopSignals
from engine.watchdog import Watchdog
from model.chat import ChatTemplate
from model.errors import InputError
from model.heads import CausalLM
from model.hf import load_config, read_model
from model.tokenizer import Tokenizer
from rlhf.dpo import DpoLossConfig, sequence_logprobs
from rlhf.dpo_job import DpoConfig, dpo
from rlhf.reference import reference_key, reference_logprobs
from tests.engine.random_kills import check_that_kills_leave_no_trace
from tests.ranks import PATIENCE, start_ranks
from tests.rlhf.planted import write_comparisons
from tests.rlhf.small_reward import write_small_sft

CONTEXT, PACK = 64, 512
LN2 = 0.6931471805599453


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SFT model, comparisons of three answers to train on, and held-out ones."""
    folder = tmp_path_factory.mktemp("planted")
    write_small_sft(folder / "sft", CONTEXT)
    write_comparisons(folder / "held.jsonl", 40, 3, first=10_000)
    write_comparisons(folder / "train.jsonl", 100, 3)
    return folder


def recipe(folder: Path, out: Path, **changes: Any) -> DpoConfig:
    return DpoConfig(
        **{
            "model": str(folder / "sft"),
            "out": str(out),
            "data": PreferenceDataConfig(paths=[str(folder / "train.jsonl")], workers=1),
            "train": TrainConfig(epochs=2, micro_batch_tokens=PACK, batch_tokens=2 * PACK),
            "optim": OptimConfig(lr=2e-3),
            "eval": EvalConfig(data=[str(folder / "held.jsonl")], every=20),
            "log": LogConfig(tensorboard=False, curves=False),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    dpo(recipe(folder, folder / "dpo"))
    return folder / "dpo"


def rows(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of steps, and rows of looks at held-out comparisons."""
    found = read_rows(directory / "metrics.jsonl")
    return [row for row in found if "loss" in row], [row for row in found if "held_out_loss" in row]


def test_it_begins_at_ln_2_and_learns_which_answers_are_better(made: Path) -> None:
    steps, looks = rows(made)
    for row, prefix in ((steps[0], ""), (looks[0], "held_out_")):
        assert row[f"{prefix}loss"] == pytest.approx(LN2, rel=2**-22)
        for name in ("chosen", "rejected", "margins"):
            assert row[f"{prefix}rewards/{name}"] == 0.0
    assert looks[-1]["held_out_loss"] < 0.9 * LN2
    assert looks[-1]["held_out_rewards/accuracies"] > 0.75
    margin = looks[-1]["held_out_rewards/margins"]
    apart = looks[-1]["held_out_rewards/chosen"] - looks[-1]["held_out_rewards/rejected"]
    assert margin == pytest.approx(apart, abs=1e-5) and margin > 0.1


def test_the_directory_is_a_language_model_with_the_template_it_was_trained_with(folder: Path, made: Path) -> None:
    assert json.loads((made / "MODEL_COMPLETE").read_text())["stage"] == "dpo"
    before, after = (Tokenizer.load(directory) for directory in (folder / "sft", made))
    assert after.fingerprint == before.fingerprint
    template = ChatTemplate.of(after)
    assert template is not None and template.name == "chimed"
    old, new = (dict(read_model(directory, load_config(directory, "lm"))) for directory in (folder / "sft", made))
    assert any(not torch.equal(old[name], tensor) for name, tensor in new.items())


def test_several_processes_begin_at_the_reference_too_and_learn_the_same(
    folder: Path, made: Path, tmp_path: Path
) -> None:
    for process in (processes := start_ranks(dpo, 2, recipe(folder, tmp_path / "dpo"))):
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    (one, _), (two, looks) = rows(made), rows(tmp_path / "dpo")
    assert two[0]["rewards/chosen"] == looks[0]["held_out_rewards/margins"] == 0.0
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)


def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(folder: Path, tmp_path: Path) -> None:
    def config(out: Path) -> DpoConfig:
        return recipe(
            folder,
            out,
            train=TrainConfig(steps=40, micro_batch_tokens=PACK, batch_tokens=2 * PACK),
            checkpoint=CheckpointConfig(every=3, keep=2),
            eval=EvalConfig(data=[str(folder / "held.jsonl")], every=20),
        )

    check_that_kills_leave_no_trace(dpo, config, tmp_path, world=2, kills=4)


def test_each_token_alike_smoothing_and_extremes_are_trained_with(folder: Path, tmp_path: Path) -> None:
    options = DpoLossConfig(1.0, extremes=True, label_smoothing=0.1, per_token=True)
    dpo(recipe(folder, tmp_path / "dpo", dpo=options, train=TrainConfig(steps=6, micro_batch_tokens=PACK)))
    steps, looks = rows(tmp_path / "dpo")
    assert steps[0]["loss"] == pytest.approx(LN2, rel=2**-22) and looks[-1]["held_out_loss"] < LN2
    assert steps[-1]["prompts"] > 40 and "tokens" not in steps[-1]


def test_what_weights_leave_to_later_epochs_has_its_reference_too(folder: Path, tmp_path: Path) -> None:
    data = PreferenceDataConfig(paths=[str(folder / "train.jsonl")], weights=[0.5], workers=1)
    dpo(recipe(folder, tmp_path / "dpo", data=data, train=TrainConfig(epochs=3, micro_batch_tokens=PACK)))
    steps, _ = rows(tmp_path / "dpo")
    assert len(steps) > 3 and steps[-1]["skipped"] == 0
    assert all(math.isfinite(row["loss"]) for row in steps)


def test_a_reference_that_was_stopped_is_read_anew_in_steps_of_another_size(folder: Path, tmp_path: Path) -> None:
    """Of 3 small steps what is in 3 large ones is not known."""
    held_out = EvalConfig(data=[str(folder / "held.jsonl")], max_tokens=PACK)
    small = TrainConfig(steps=3, micro_batch_tokens=PACK, batch_tokens=PACK)
    dpo(recipe(folder, tmp_path / "dpo", train=small, eval=held_out))
    shutil.rmtree(tmp_path / "dpo" / "state")
    for name in json.loads((tmp_path / "dpo" / "MODEL_COMPLETE").read_text())["files"]:
        (tmp_path / "dpo" / name).unlink()  # one that was stopped before its first checkpoint has no model
    large = TrainConfig(steps=3, micro_batch_tokens=PACK, batch_tokens=2 * PACK)
    held_out = EvalConfig(data=[str(folder / "held.jsonl")])
    dpo(recipe(folder, tmp_path / "dpo", train=large, eval=held_out))
    steps, looks = rows(tmp_path / "dpo")
    assert len(steps) == 3
    assert all(math.isfinite(loss) for loss in (steps[-1]["loss"], looks[-1]["held_out_loss"]))


def test_a_run_goes_on_with_the_reference_that_it_began_with(folder: Path, tmp_path: Path) -> None:
    config = recipe(folder, tmp_path / "dpo", train=TrainConfig(steps=1, micro_batch_tokens=PACK))
    dpo(config)
    write_small_sft(tmp_path / "sft", CONTEXT)
    other = dataclasses.replace(config, model=str(tmp_path / "sft"), train=dataclasses.replace(config.train, steps=2))
    with pytest.raises(InputError, match="its checkpoint was trained with model"):
        dpo(other)
    stop()


def test_a_dry_run_shows_the_plan_and_the_answers_of_a_prompt(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dpo(recipe(folder, tmp_path / "dpo", dry_run=True))
    shown = capsys.readouterr().out
    assert "memory of a rank" in shown and "Learning rate at step 1" in shown
    assert shown.count("⟦") >= 3 and "[human]:患者0，高血压，怎么办？" in shown
    assert not (tmp_path / "dpo").exists()


# The reference


class Counted(CausalLM):
    """A model that counts how often it is called."""

    calls = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return super().forward(*arguments, **options)


class Asked(StopSignals):
    """Signals of which one arrives before a given step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    @property
    def wants_stop(self) -> bool:
        self._left -= 1
        return self._left == 0


@pytest.fixture
def comparisons(folder: Path) -> Iterator[PreferenceSet]:
    tokenizer = Tokenizer.load(folder / "sft")
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    start(ParallelConfig())
    config = PreferenceDataConfig(paths=[str(folder / "held.jsonl")], workers=1)
    yield open_preferences(config, template, tokenizer, CONTEXT, folder)
    stop()


def small_model(folder: Path) -> Counted:
    config = load_config(folder / "sft", "lm")
    model = Counted(config)
    model.load_state_dict(dict(read_model(folder / "sft", config)), strict=False)
    return model


def read(
    model: nn.Module,
    comparisons: PreferenceSet,
    path: Path,
    stop_at: int = 0,
    key: str = "one",
    batches: list[list[RankedBatch]] | None = None,
) -> Tensor:
    batches = batches or [[batch] for batch in evaluation_ranked_batches(comparisons, PACK, CONTEXT)]
    runtime = start(ParallelConfig())
    with Watchdog(60, "test") as dog:
        return reference_logprobs(
            model, iter(batches), len(batches), comparisons.num_sequences, path, key, runtime, dog, Asked(stop_at)
        )


def test_the_reference_of_every_answer_is_what_the_model_gives_it(
    folder: Path, tmp_path: Path, comparisons: PreferenceSet
) -> None:
    model = small_model(folder)
    found = read(model, comparisons, tmp_path / "reference")
    assert len(found) == 120 and bool(found.isfinite().all())
    batch: RankedBatch
    for batch in evaluation_ranked_batches(comparisons, PACK, CONTEXT):
        own = sequence_logprobs(model, batch)[batch.is_sequence]
        assert torch.equal(found[batch.sequence[batch.is_sequence]], own)


def test_a_stopped_reference_goes_on_where_it_was_and_ends_with_the_same_bits(
    folder: Path, tmp_path: Path, comparisons: PreferenceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = small_model(folder), len(list(evaluation_ranked_batches(comparisons, PACK, CONTEXT)))
    whole = read(model, comparisons, tmp_path / "whole")
    assert model.calls == steps > 6
    with pytest.raises(StoppedError, match=f"after 3 of {steps} steps of the reference"):
        read(model, comparisons, tmp_path / "parts", stop_at=3)
    model.calls = 0
    assert torch.equal(read(model, comparisons, tmp_path / "parts"), whole)
    assert model.calls == steps - 3
    assert torch.equal(read(model, comparisons, tmp_path / "parts"), whole) and model.calls == steps - 3

    # Killed without a word, it goes on from the last save.
    monkeypatch.setattr(rlhf.reference, "SAVE_EVERY", 2)

    def die(*arguments: Any) -> Tensor:
        if model.calls == steps + 5:
            raise KeyboardInterrupt
        return sequence_logprobs(*arguments)

    monkeypatch.setattr(rlhf.reference, "sequence_logprobs", die)
    model.calls = steps
    with pytest.raises(KeyboardInterrupt):
        read(model, comparisons, tmp_path / "killed")
    monkeypatch.undo()
    model.calls = 0
    assert torch.equal(read(model, comparisons, tmp_path / "killed"), whole) and model.calls == steps - 4


def test_where_epochs_meet_the_value_of_the_first_stays(
    folder: Path, tmp_path: Path, comparisons: PreferenceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = small_model(folder), [[each] for each in evaluation_ranked_batches(comparisons, PACK, CONTEXT)]
    whole = read(model, comparisons, tmp_path / "once")
    model.calls = 0

    def drifting(*arguments: Any) -> Tensor:
        return sequence_logprobs(*arguments) - (100 if model.calls > len(batches) else 0)

    monkeypatch.setattr(rlhf.reference, "sequence_logprobs", drifting)
    assert torch.equal(read(model, comparisons, tmp_path / "twice", batches=2 * batches), whole)
    assert model.calls == 2 * len(batches)


def test_the_reference_of_another_model_or_of_other_data_is_not_taken(
    folder: Path, tmp_path: Path, comparisons: PreferenceSet
) -> None:
    model = small_model(folder)
    read(model, comparisons, tmp_path / "reference", key=reference_key(folder / "sft", "data"))
    once = model.calls
    other = write_small_sft(tmp_path / "sft", CONTEXT)
    for key in (reference_key(folder / "sft", "other data"), reference_key(other, "data")):
        read(model, comparisons, tmp_path / "reference", key=key)
    assert model.calls == 3 * once
