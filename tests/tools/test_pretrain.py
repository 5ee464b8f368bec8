"""The job from the command line: what it reads, what it says, what it leaves."""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from engine.data import loader
from kernels.masters import split_master
from tests.ranks import PATIENCE
from tests.small_base import small_texts
from tests.tools.in_child import TOOLS, run_tool
from tests.tools.small_job import checkpoints, held_out_losses, losses, pretrain, rows, weights, write_small_job

QUIET = ("--log.tensorboard", "false", "--log.curves", "false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, and its plain run in `run`: four steps on one process."""
    folder = write_small_job(tmp_path_factory.mktemp("job"))
    pretrain(folder, "run")
    return folder


def test_without_flags_the_bundled_recipe_runs_and_runs_again_bitwise(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (ended,) = run_tool("pretrain", "--train.steps", 6, *QUIET, cwd=tmp_path / name)
        assert ended.code == 0, ended.stderr
    one, two = tmp_path / "one" / "ckpt" / "pretrain", tmp_path / "two" / "ckpt" / "pretrain"
    assert rows(one) == rows(two)
    assert weights(one) == weights(two)
    assert [row["step"] for row in rows(one)] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert losses(one)[-1] < losses(one)[0]
    beaten = re.search(r"Held-out loss to beat .*: bigram ([\d.]+), trigram ([\d.]+)\.", ended.stderr)
    assert beaten is not None and 0 < float(beaten[2]) < float(beaten[1]) < math.log(4096)


def torchrun(cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The real launcher with two processes of the tool."""
    launcher = Path(sys.executable).with_name("torchrun")
    command = [str(word) for word in (launcher, "--nproc-per-node", 2, TOOLS / "pretrain.py", *words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def held_out_loss_by_transformers(directory: Path, texts: list[str], context: int) -> float:
    """Mean over all targets, each document cut at the context, by what other people load the directory with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
        for start in range(0, len(ids) - 1, context):
            inputs, targets = ids[start : start + context], ids[start + 1 : start + context + 1]
            with torch.no_grad():
                logits = model(inputs[None]).logits[0, : len(targets)]
            assert logits.isfinite().all()
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
    return total / count


def test_real_files_under_torchrun_become_a_model_that_transformers_agrees_with(
    real_data: Path, tmp_path: Path
) -> None:
    classics = (real_data / "pretrain" / "tcm_classics.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"][200:900] for line in classics[:12]]
    (tmp_path / "held_out.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": texts[0] * 2}) + '\n{"text": "患者')
    ended = torchrun(
        tmp_path,
        *("--model", "tiny", "--out", "run", "--data", real_data / "pretrain", "more.jsonl", *QUIET),
        *("--eval.data", "held_out.jsonl", "--train.steps", 8),
        *("--train.batch_tokens", 2048, "--train.micro_batch_tokens", 1024),
    )
    assert ended.returncode == 0, ended.stderr
    assert "Training a tokenizer of 4096 pieces" in ended.stderr
    assert "Files read: 3 gbk, 4 utf-8;" in ended.stderr
    assert re.search(r"Left out: .*1 malformed \(run/prepared/\w+/rejects\.jsonl\)", ended.stderr)
    reported = held_out_losses(tmp_path / "run")
    assert reported[8] < reported[0] - 0.5
    assert held_out_loss_by_transformers(tmp_path / "run", texts, 256) == pytest.approx(reported[8], rel=1e-5)


def test_a_mistake_that_one_rank_meets_is_said_once_and_last_under_torchrun(folder: Path) -> None:
    """Rank 0 reads the data while the others wait."""
    (folder / "empty.jsonl").touch()
    ended = torchrun(folder, "--config", "recipe.yaml", "--data", "empty.jsonl")
    assert ended.returncode == 1
    sentence = "empty.jsonl: there is no document to read. Give --data other files."
    assert ended.stderr.count(sentence) == 1
    report = ended.stderr.rsplit("Root Cause", 1)[1]
    assert sentence in report and re.search(r"exitcode  : 2\b", report)
    assert "Traceback" not in report
    assert "engine/pretraining.py" not in ended.stderr, "a traceback of ours, beside the launcher's own"


def test_a_trained_model_is_where_the_next_run_begins(folder: Path) -> None:
    pretrain(folder, "more", "--model", "run")
    first = held_out_losses(folder / "run")
    second = held_out_losses(folder / "more")
    assert first[0] == pytest.approx(math.log(448), abs=0.1)
    assert first[4] < first[0]
    # The directory holds fp32, so nothing is lost on the way.
    assert second[0] == pytest.approx(first[4], rel=1e-6)


def test_prepared_parts_train_as_the_raw_file_does(folder: Path) -> None:
    for part in ("1/2", "2/2"):
        (ended,) = run_tool(
            *("prepare", "--data", "data.jsonl", "--tokenizer", "base", "--out", "parts", "--part", part), cwd=folder
        )
        assert ended.code == 0, ended.stderr
    pretrain(folder, "from-parts", "--data", "parts")
    assert rows(folder / "from-parts") == rows(folder / "run")
    assert weights(folder / "from-parts") == weights(folder / "run")


def test_documents_that_are_also_held_out_are_not_trained_on(folder: Path) -> None:
    texts = [*small_texts()[10:30], "这一份文本不在训练数据之中，只用来评估。"]
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    said = pretrain(folder, "apart", "--eval.data", "held_out.jsonl").stderr
    assert "20 training documents are also held out; they are not trained on." in said
    assert re.search(r"380 documents, [\d,]+ tokens to train on; 21 documents, [\d,]+ tokens held out", said)


def test_a_run_that_is_complete_ends_at_once_and_changes_nothing(folder: Path) -> None:
    shutil.copytree(folder / "run", folder / "again")
    pretrain(folder, "again")
    assert rows(folder / "again") == rows(folder / "run")
    assert weights(folder / "again") == weights(folder / "run")
    assert checkpoints(folder / "again") == checkpoints(folder / "run")


def test_flags_stand_above_the_recipe_and_the_resolved_recipe_runs_the_same_again(folder: Path) -> None:
    pretrain(folder, "first", "--train.steps", 3, "--optim.lr", 0.01)
    resolved = yaml.safe_load((folder / "first" / "config.yaml").read_text())
    assert (resolved["train"]["steps"], resolved["optim"]["lr"], resolved["train"]["batch_tokens"]) == (3, 0.01, 256)
    assert resolved["train"]["context"] == 32
    (ended,) = run_tool("pretrain", "--config", "first/config.yaml", "--out", "second", cwd=folder)
    assert ended.code == 0, ended.stderr
    assert rows(folder / "second") == rows(folder / "first")
    assert weights(folder / "second") == weights(folder / "first")
    again = yaml.safe_load((folder / "second" / "config.yaml").read_text())
    assert again == {**resolved, "out": "second"}


def test_the_model_with_the_lowest_held_out_loss_is_kept(folder: Path) -> None:
    # The rate rises by 0.1 a step, until it destroys what the first steps learnt.
    rising = ("--optim.lr", 1000, "--schedule.warmup_steps", 10_000, "--train.steps", 8)
    pretrain(folder, "noisy", *rising, "--eval.every", 1, "--checkpoint.keep_best", "true")
    seen = held_out_losses(folder / "noisy")
    best = min((step for step in seen if step), key=seen.__getitem__)
    assert best < 8, "the last model must not be the best one to prove anything"
    assert json.loads((folder / "noisy" / "best" / "MODEL_COMPLETE").read_text())["step"] == best
    pretrain(folder, "from-best", "--model", "noisy/best", "--train.steps", 1)
    assert held_out_losses(folder / "from-best")[0] == pytest.approx(seen[best], rel=1e-6)


def test_asynchronous_checkpoints_hold_what_synchronous_ones_do(folder: Path) -> None:
    pretrain(folder, "aside", "--checkpoint.asynchronous", "true")
    assert checkpoints(folder / "aside") == checkpoints(folder / "run") == ["step-00000002", "step-00000004"]
    assert rows(folder / "aside") == rows(folder / "run")
    for name in checkpoints(folder / "run"):
        (expected,), (found,) = ((folder / out / "state" / name).glob("*.safetensors") for out in ("run", "aside"))
        one, other = load_file(expected), load_file(found)
        assert one.keys() == other.keys() and all(torch.equal(one[tensor], other[tensor]) for tensor in one)


def test_two_processes_in_replicas_train_as_one_process_does(folder: Path) -> None:
    pretrain(folder, "sharded", world=2)
    pretrain(folder, "replicated", "--parallel.replicas", 2, world=2)
    assert losses(folder / "sharded") == pytest.approx(losses(folder / "run"), rel=1e-5)
    assert losses(folder / "replicated") == pytest.approx(losses(folder / "run"), rel=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(folder: Path, recompute: str) -> None:
    pretrain(folder, recompute, "--train.recompute", recompute)
    assert rows(folder / recompute) == rows(folder / "run")


def test_bf16_trains_and_publishes_bf16(folder: Path) -> None:
    pretrain(folder, "half", "--train.precision", "bf16", "--train.recompute", "full")
    # Eight bits of mantissa round the loss of equal weights by less than one part in 2^8.
    assert losses(folder / "half")[0] == pytest.approx(losses(folder / "run")[0], rel=2**-8)
    assert losses(folder / "half")[-1] < losses(folder / "half")[0]
    published = load_file(folder / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    (state,) = (folder / "half" / "state" / checkpoints(folder / "half")[-1]).glob("*.safetensors")
    master = load_file(state)["model.model.norm.weight"]
    assert master.dtype == torch.float32 and not torch.equal(master, master.bfloat16().float())
    assert torch.equal(published["model.norm.weight"], split_master(master)[0])
    assert json.loads((folder / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


class SlowQueue(queue.Queue):
    """Whoever takes from it waits, however far ahead others have read."""

    def get(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return super().get(*args, **kwargs)


def slow_down_reading() -> None:
    """Have every step wait for its data."""
    loader.queue = SimpleNamespace(Queue=SlowQueue, Empty=queue.Empty)


def test_speed_is_that_of_each_step_although_its_numbers_are_read_later(folder: Path) -> None:
    pretrain(folder, "slow", before=slow_down_reading)
    lines = (folder / "slow" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "loss" in row]
    # Waiting is a part of a step. Timed by when they are read, two steps read in a row would make the second one short.
    assert len(steps) == 4 and all(0 <= row["data_wait_share"] <= 1 for row in steps)
    assert steps[-1]["data_wait_share"] > 0.1
