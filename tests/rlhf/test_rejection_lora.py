"""Rejection sampling of adapters: each round trains some beside the same weights, and answers with both merged."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.building import find_trained
from engine.conversations import ConversationDataConfig
from engine.loop import EvalConfig
from engine.lora import LoraConfig
from engine.mesh import ParallelConfig, start, stop
from engine.optim import OptimConfig
from engine.sft import SftConfig, fine_tune
from model.chat import ChatTemplate
from model.errors import InputError
from model.sampling import row_seed
from model.tokenizer import Tokenizer
from rlhf.prompts import Prompt
from rlhf.rejection_config import RejectionConfig
from rlhf.rejection_job import rejection
from rlhf.rollout import Rollout
from tests.engine.kill import run_to_the_end_or_a_kill
from tests.model.tiny import loaded
from tests.ranks import PATIENCE, start_ranks
from tests.rlhf.small_rejection import CONTEXT, small_rejection, write_small_rejection
from tests.rlhf.test_rejection import killed_at, lines

ADAPTER = "adapter_model.safetensors"
RANK = 4


def small_lora(folder: Path, out: Path, **changes: object) -> RejectionConfig:
    return small_rejection(folder, out, **{"lora": LoraConfig(rank=RANK), "optim": OptimConfig(lr=1e-2), **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_rejection(tmp_path_factory.mktemp("rejection"))


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """Two rounds, of which the second goes on from the first."""
    rejection(small_lora(folder, folder / "made", begin="last"))
    return folder / "made"


def adapters(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / ADAPTER)


def files(directory: Path) -> dict[str, bytes]:
    """What the rounds computed, by name."""
    found = [*directory.glob("rounds/*/*.jsonl"), *directory.glob(f"**/{ADAPTER}")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def written_out(base: Path, adapter: Path, directory: Path) -> Path:
    """W + alpha / r B A of every projection, as a model directory."""
    shutil.copytree(base, directory)
    matrices, weights = adapters(adapter), load_file(base / "model.safetensors")
    for name in matrices:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = matrices[name.replace("lora_A", "lora_B")]
            weights[f"{module}.weight"] += 2 * b @ matrices[name]
    save_file(weights, directory / "model.safetensors")
    return directory


def test_every_round_leaves_an_adapter_of_the_same_base_and_the_last_is_in_out(folder: Path, made: Path) -> None:
    assert not list(made.glob("**/model.safetensors"))
    for directory in (made, made / "rounds/1/model", made / "rounds/2/model"):
        facts = json.loads((directory / "adapter_config.json").read_text())
        assert (facts["r"], facts["base_model_name_or_path"]) == (RANK, str(folder / "sft"))
    assert files(made)[ADAPTER] == files(made)[f"rounds/2/model/{ADAPTER}"]
    means = [json.loads((made / f"rounds/{number}/picks.json").read_text())["mean_score"] for number in (1, 2)]
    assert means[1] > means[0]


def test_a_round_answers_with_merged_weights(folder: Path, made: Path, tmp_path: Path) -> None:
    """The first chunk of the second round, drawn again with W + BA written out by hand."""
    dense = written_out(folder / "sft", made / "rounds/1/model", tmp_path / "dense")
    rows = lines(made / "rounds/2/samples.jsonl")[:8]
    assert len({tuple(one["ids"]) for row in rows for one in row["responses"]}) > 20
    model, tokenizer = loaded(dense), Tokenizer.load(made)
    ends = ChatTemplate.named("chimed", tokenizer).end_ids(tokenizer)
    rollout = Rollout(model.config, tokenizer, ends, seed=0, dtype=torch.float32, context=CONTEXT)
    prompts = [Prompt(row["index"], row["prompt_ids"], (), {}) for row in rows]
    seed = row_seed(small_lora(folder, made).seed, 2)
    answers = rollout.collect(model, prompts, 4, 1.0, 16, 1, start(ParallelConfig()), seed)
    assert [answer.answer_ids for answer in answers] == [one["ids"] for row in rows for one in row["responses"]]
    stop()


def test_the_last_round_s_adapters_go_on_or_fresh_ones_begin(folder: Path, made: Path, tmp_path: Path) -> None:
    """The second round's training once more, by hand."""
    config, runtime = small_lora(folder, made), start(ParallelConfig())
    first, second = made / "rounds/1/model", made / "rounds/2/model"
    names = ("seed", "train", "schedule", "lora", "guard", "parallel", "log", "chat")
    groups = {name: getattr(config, name) for name in names}
    data = ConversationDataConfig(paths=[str(made / "rounds/2/picks")])
    base = find_trained(config.model, "tools/sft.py")

    def trained(out: str, lr: float, adapters: Path | None) -> Path:
        none, optim = EvalConfig(every=0, fraction=0.0), dataclasses.replace(config.optim, lr=lr)
        job = SftConfig(model=config.model, out=str(tmp_path / out), eval=none, data=data, optim=optim, **groups)
        fine_tune(job, dataclasses.replace(base, adapters=adapters), runtime)
        return tmp_path / out

    went_on, stayed, anew = trained("on", 1e-2, first), trained("stays", 1e-12, first), trained("anew", 1e-2, None)
    stop()
    assert (went_on / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    assert all(torch.allclose(one, adapters(first)[name], atol=1e-9) for name, one in adapters(stayed).items())
    rejection(small_lora(folder, tmp_path / "base", begin="base"))
    assert (tmp_path / "base/rounds/1/model" / ADAPTER).read_bytes() == (first / ADAPTER).read_bytes()
    assert (tmp_path / "base/rounds/2/model" / ADAPTER).read_bytes() == (anew / ADAPTER).read_bytes()


def test_killed_again_and_again_it_ends_with_the_files_of_an_unbroken_run(
    folder: Path, made: Path, tmp_path: Path
) -> None:
    config, chance = small_lora(folder, tmp_path / "killed", begin="last"), random.Random(1)
    reached: list[int] = []
    while not run_to_the_end_or_a_kill(killed_at, config, chance.randint(60, 300)):
        reached.append(len(list((tmp_path / "killed").glob("rounds/**/*"))))
        assert len(reached) < 20
    assert len(set(reached)) >= 3, f"the kills must fall apart to prove anything: {reached}"
    assert files(tmp_path / "killed") == files(made)


def test_two_processes_train_the_adapters_of_one(folder: Path, made: Path, tmp_path: Path) -> None:
    config = small_lora(folder, tmp_path / "two", rounds=1)
    for process in (processes := start_ranks(rejection, 2, config)):
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    assert lines(tmp_path / "two/rounds/1/samples.jsonl") == lines(made / "rounds/1/samples.jsonl")
    for name, value in adapters(made / "rounds/1/model").items():
        found = adapters(tmp_path / "two")[name]
        assert value.any() and (found - value).abs().max() <= 1e-4 * value.abs().max(), name


def test_adapters_learn_ten_times_as_fast_unless_a_rate_is_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for rank, given, rate in ((0, None, "1.00e-05"), (2, None, "1.00e-04"), (2, 3e-3, "3.00e-03")):
        options = {"lora": LoraConfig(rank=rank), "optim": OptimConfig(lr=given)}
        rejection(small_rejection(folder, tmp_path / "out", dry_run=True, **options))
        assert f"Peak learning rate {rate}." in capsys.readouterr().out


def test_adapters_beside_other_weights_are_not_gone_on_with(folder: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "out")
    identity = tmp_path / "out/rounds/identity.json"
    facts = json.loads(identity.read_text())
    facts["base"]["fingerprint"] = "0" * 32
    identity.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"its adapters were trained beside weights that lay in .*sft, and those in"):
        rejection(small_lora(folder, tmp_path / "out", begin="last"))
    stop()
