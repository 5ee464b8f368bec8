"""Rejection sampling and DPO from the command line: how a run ends before its end, and what 13B needs."""

from __future__ import annotations

import functools
import json
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import PATIENCE
from tests.rlhf.planted import write_comparisons
from tests.rlhf.small_reward import write_small_reward_model, write_small_sft
from tests.small_base import write_small_base
from tests.tools.in_child import TOOLS, Running, hold_generation, run_tool, start_tool

WORDS = ("--model", "sft", "--reward", "rm", "--data", "compared.jsonl", "--eval.fraction", 0.1)
WORDS += ("--rollout.samples", 3, "--rollout.max_new_tokens", 12, "--rollout.chunk", 3, "--select.truncated", True)
WORDS += ("--train.steps", 3, "--train.micro_batch_tokens", 128, "--train.batch_tokens", 256)
WORDS += ("--log.tensorboard", False, "--log.curves", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_small_sft(folder / "sft")
    write_small_reward_model(folder / "rm")
    write_comparisons(folder / "compared.jsonl", 30, 2)
    return folder


def wait_for_samples(running: Running, path: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and all(process.is_alive() for process in running.processes):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"there were never {count} prompts with samples: {running.stderr()}")


def test_a_signal_while_sampling_is_heard_and_the_same_command_ends_as_unbroken(folder: Path) -> None:
    ends = run_tool("rejection", *WORDS, "--out", "unbroken", cwd=folder, world=2)
    assert [ended.code for ended in ends] == [0, 0], ends[0].stderr
    samples = folder / "stopped/rounds/1/samples.jsonl"
    three = sum(map(len, (folder / "unbroken/rounds/1/samples.jsonl").read_bytes().splitlines(keepends=True)[:3]))
    before = functools.partial(hold_generation, str(samples), three, "signalled")
    running = start_tool("rejection", *WORDS, "--out", "stopped", cwd=folder, world=2, before=before)
    wait_for_samples(running, samples, 3)
    running.signal(1, signal.SIGTERM)
    (folder / "signalled").touch()
    assert [ended.code for ended in running.wait()] == [143, 143]
    assert 3 <= samples.read_bytes().count(b"\n") < 27, "it must fall between samples to prove anything"
    (refused,) = run_tool("chat", "--model", "stopped", cwd=folder)
    assert refused.code == 2 and "has not finished writing its model" in refused.last_line
    ends = run_tool("rejection", *WORDS, "--out", "stopped", cwd=folder, world=2)
    assert [ended.code for ended in ends] == [0, 0], ends[0].stderr
    for name in ("rounds/1/samples.jsonl", "rounds/1/picks.jsonl", "rounds/1/held_out.jsonl", "model.safetensors"):
        assert (folder / "stopped" / name).read_bytes() == (folder / "unbroken" / name).read_bytes()
    assert "held-out prompts: mean score" in ends[0].stdout


@pytest.mark.parametrize("tool", ["rejection", "dpo"])
def test_the_recipe_for_13b_is_planned_without_weights_or_gpu(tmp_path: Path, tool: str) -> None:
    write_small_base(tmp_path / "base")
    facts = json.loads((tmp_path / "base" / "config.json").read_text())
    size = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    size |= {"num_key_value_heads": 40, "head_dim": 128, "vocab_size": 39424, "max_position_embeddings": 4096}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**facts, **size, "tie_word_embeddings": False}))
    (tmp_path / "base" / "model.safetensors").unlink()
    write_comparisons(tmp_path / "compared.jsonl", 5, 2)
    recipe = TOOLS.parent / "configs" / "ziya2-13b" / "8x80gb" / f"{tool}.yaml"
    card = ("--plan.world", 8, "--plan.device_gib", 79.1)
    (ended,) = run_tool(
        tool, "--config", recipe, "--model", "base", "--data", "compared.jsonl", "--dry-run", *card, cwd=tmp_path
    )
    assert ended.code == 0, ended.stderr
    assert ended.stdout.count("it fits the 79.1 GiB") == {"rejection": 2, "dpo": 1}[tool]
