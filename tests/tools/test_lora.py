"""Adapters from the command line: stage on top of stage, on any number of processes, beside any copy of a base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.loggers import read_rows
from tests.small_base import write_small_data
from tests.tools.in_child import start_tool
from tests.tools.small_sft import sft, write_small_sft_job

RANK = ("--lora.rank", 4, "--optim.lr", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of adapters, `first`."""
    made = write_small_sft_job(tmp_path_factory.mktemp("job"))
    sft(made, "first", *RANK)
    return made


def held_out(run: Path) -> list[float]:
    return [row["held_out_loss"] for row in read_rows(run / "metrics.jsonl") if "held_out_loss" in row]


def adapters(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def test_the_next_stage_begins_where_the_adapters_ended_and_needs_no_merging(folder: Path) -> None:
    """Trained on top of it in turn, and in pre-training as in fine-tuning."""
    sft(folder, "second", *RANK, "--model", "first")
    before, after = held_out(folder / "first"), held_out(folder / "second")
    assert after[0] == pytest.approx(before[-1], rel=1e-6) and after[-1] < before[-1] < before[0]
    assert json.loads((folder / "second" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder / "first"
    )
    sft(folder, "third", "--model", "second")
    assert held_out(folder / "third")[0] == pytest.approx(after[-1], rel=1e-6)
    assert (folder / "third" / "model.safetensors").is_file() and not (
        folder / "third" / "adapter_config.json"
    ).exists()


def test_pretraining_of_adapters_goes_on_from_adapters(folder: Path) -> None:
    write_small_data(folder / "texts.jsonl")
    words = ("--data", "texts.jsonl", "--train.steps", 4, "--train.batch_tokens", 1024, *RANK)
    for model, out in (("base", "texts"), ("texts", "more")):
        command = ("--model", model, "--out", out, "--log.curves", "false", *words)
        (ended,) = start_tool("pretrain", *command, cwd=folder).wait()
        assert ended.code == 0, ended.stderr
    before, after = held_out(folder / "texts"), held_out(folder / "more")
    assert after[0] == pytest.approx(before[-1], rel=1e-6) and after[-1] < before[-1] < before[0]


def test_two_processes_train_the_adapters_of_one(folder: Path) -> None:
    sft(folder, "by-two", *RANK, world=2)
    one, two = adapters(folder / "first"), adapters(folder / "by-two")
    assert one.keys() == two.keys() and len(one) == 2 * 7 * 2
    for name, value in one.items():
        assert value.any() and (two[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_a_base_that_has_moved_is_the_same_base(folder: Path) -> None:
    shutil.copytree(folder / "first", folder / "resumed")
    shutil.copytree(folder / "base", folder / "moved")
    sft(folder, "resumed", *RANK, "--model", "moved")
    found, expected = adapters(folder / "resumed"), adapters(folder / "first")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_dry_run_tells_frozen_weights_from_adapters(folder: Path) -> None:
    command = ("--model", "ziya2-13b", *RANK, "--dry-run", "--plan.device_gib", 79.1)
    (ended,) = start_tool("sft", *command, cwd=folder).wait()
    assert ended.code == 0, ended.stderr
    # 2 bytes a weight; for each layer of width d and F, 4 adapters on d, d and 3 on d, F: r (8 d + 3 (d + F)).
    adapters = 40 * 4 * (8 * 5120 + 3 * (5120 + 13824))
    lines = dict(line.split()[:2] for line in ended.stdout.splitlines() if line.startswith("    "))
    assert float(lines["frozen"]) == pytest.approx(2 * 13_091_886_080 / 2**30, abs=0.005)
    assert float(lines["adapters"]) == pytest.approx(4 * adapters / 2**30, abs=0.005)
    assert f"adapters of rank 4: {adapters:,} are trained" in ended.stdout
    assert "it fits the 79.1 GiB that are there" in ended.stdout
