"""An adapter's directory where a model directory is asked for: tools/convert.py, the generator, jobs and their keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.building import base_tokenizer, find_trained
from engine.conversion import end_ids, export_model, generation_facts, merge_model
from engine.model_directory import ModelDirectory
from engine.publish import MODEL_COMPLETE, mark_complete, require_model
from engine.verification import verify_model
from model.chat import ChatTemplate
from model.directories import lineage
from model.errors import InputError
from model.generate import Request
from model.hf import load_config, read_model, write_model
from model.lora import LoraSpec
from model.sampling import SamplingOptions
from model.tokenizer import Tokenizer, has_tokenizer
from model.weight_files import TensorStore
from rlhf.reference import reference_key
from rlhf.reward_model import open_reward_model
from tests.model.peft_models import opened_by_peft
from tests.small_adapter import write_small_adapter
from tests.small_base import write_small_base
from tests.tools.in_child import run_tool
from tests.tools.small_job import pretrain, start_pretraining, write_small_job


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat model, `base`, and `adapter` on it."""
    folder = tmp_path_factory.mktemp("original")
    base = write_small_base(folder / "base", context=256)
    tokenizer = Tokenizer.load(base)
    ChatTemplate.named("chimed", tokenizer).store(tokenizer).save(base)
    change(base / "generation_config.json", eos_token_id=[2, 7], top_p=0.8)
    write_small_adapter(folder / "adapter", base)
    change(folder / "adapter" / "adapter_config.json", base_model_name_or_path="../base")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(original, tmp_path / "models"))


def change(path: Path, **facts: object) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def change_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_merge_writes_the_weights_that_peft_merges(folder: Path) -> None:
    (ended,) = run_tool("convert", "merge", "adapter", "--out", "whole", cwd=folder)
    assert ended.code == 0, ended.stderr
    assert "whole: 20,088 parameters in float32, 82.4 kB in 1 file" in ended.stdout
    merged = opened_by_peft(folder / "base", folder / "adapter").merge_and_unload().state_dict()
    weights = load_file(folder / "whole" / "model.safetensors")
    assert merged.keys() - weights.keys() == {"lm_head.weight"}  # tied
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6)
    assert json.loads((folder / "whole" / MODEL_COMPLETE).read_text())["stage"] == "merge"
    assert Tokenizer.load(folder / "whole").fingerprint == Tokenizer.load(folder / "base").fingerprint
    assert not (folder / "whole" / "adapter_config.json").exists()
    assert verify_model(folder / "whole", folder / "adapter").is_equal


def test_merge_keeps_the_dtype_of_the_base_and_rounds_once(folder: Path) -> None:
    in_fp32 = dict(read_model(folder / "adapter", load_config(folder / "adapter")))
    change_weights(folder / "base" / "model.safetensors", lambda w: w.update({n: t.bfloat16() for n, t in w.items()}))
    (folder / "adapter" / "adapted_config.json").unlink()
    merge_model(folder / "adapter", folder / "whole")
    merged = dict(read_model(folder / "whole", load_config(folder / "whole")))
    exact = dict(read_model(folder / "adapter", load_config(folder / "adapter")))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert exact[name].dtype == torch.float32 and not torch.equal(exact[name], in_fp32[name])
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in merged.items())


def test_export_and_import_of_an_adapter_merge_too(folder: Path) -> None:
    merge_model(folder / "adapter", folder / "whole")
    export_model(folder / "adapter", folder / "theirs")
    one, other = (load_file(folder / name / "model.safetensors") for name in ("whole", "theirs"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_run_with_an_adapter_is_exported_by_step_and_trained_on(tmp_path: Path) -> None:
    write_small_job(tmp_path)
    pretrain(tmp_path, "run", "--lora.rank", 2, world=2)
    merge_model(tmp_path / "run", tmp_path / "published")
    weights = {}
    for step in (2, 4):
        export_model(tmp_path / "run", tmp_path / f"step-{step}", step=step)
        weights[step] = load_file(tmp_path / f"step-{step}" / "model.safetensors")
    published = load_file(tmp_path / "published" / "model.safetensors")
    assert all(torch.equal(weights[4][name], tensor) for name, tensor in published.items())
    assert not all(torch.equal(weights[2][name], tensor) for name, tensor in published.items())
    pretrain(tmp_path, "again", "--model", "run", "--lora.rank", 1)
    assert [path.name for path in lineage(tmp_path / "again")] == ["again", "run", "base"]
    (refused,) = start_pretraining(tmp_path, "run", "--model", "again", "--lora.rank", 1, "--resume", "never").wait()
    assert refused.code == 2 and refused.last_line.startswith("--out run: --model again is read from there, and")
    pretrain(tmp_path, "whole", "--model", "again", "--train.steps", 1, "--optim.lr", 1e-12)
    merge_model(tmp_path / "again", tmp_path / "both")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "whole"))
    assert all(torch.allclose(before[name], tensor, rtol=0, atol=1e-6) for name, tensor in after.items())


def test_one_module_after_another_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    original = TensorStore.read

    def counted(store: TensorStore, name: str) -> Tensor:
        reads.append(name)
        return original(store, name)

    monkeypatch.setattr(TensorStore, "read", counted)
    stream = read_model(folder / "adapter", load_config(folder / "adapter"))
    assert reads == []
    most = 0
    for _ in stream:
        modules = {name.removeprefix("base_model.model.").partition(".lora_")[0].rsplit(".", 2)[0] for name in reads}
        most = max(most, len(modules))
        reads.clear()
    assert 1 <= most <= 2  # one, and the first tensor of the next


def test_a_reward_model_may_be_an_adapter(folder: Path) -> None:
    config = replace(load_config(folder / "base"), head="score", score_mean=0.25, score_std=2.0)
    write_small_adapter(folder / "judge", folder / "base", LoraSpec(2, 4.0, trained=("score",)), config=config)
    judge = open_reward_model(folder / "judge", Tokenizer.load(folder / "base"))
    assert (judge.mean, judge.std) == (0.25, 2.0)
    weights = dict(read_model(judge.directory, judge.config))
    assert weights["score.weight"].shape == (1, 24) and "lm_head.weight" not in weights
    with pytest.raises(InputError, match="judge is a reward model"):
        ModelDirectory.open(str(folder / "judge"))


def test_verify_and_inspect_take_an_adapter(folder: Path) -> None:
    assert verify_model(folder / "adapter").is_equal
    (ended,) = run_tool("convert", "inspect", "adapter", cwd=folder)
    assert ended.code == 0, ended.stderr
    shown = " ".join(ended.stdout.split())
    for fact in (
        "adapter 1,440 parameters: rank 2, alpha 4, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;",
        "LlamaForCausalLM: 2 layers of width 24",
        "parameters 20,088",
        "chat template chimed",
        "missing nothing",
    ):
        assert fact in shown


def test_the_generator_writes_what_the_merged_model_writes(folder: Path) -> None:
    merge_model(folder / "adapter", folder / "whole")
    written = {}
    for name in ("base", "adapter", "whole"):
        directory = ModelDirectory.open(str(folder / name))
        generator = directory.generator(device="cpu")
        prompt = directory.tokenizer.encode("患者因头晕就诊，")
        request = Request(prompt, SamplingOptions(temperature=0.0, max_new_tokens=20))
        (result,) = generator.generate([request])
        written[name] = result.ids
        assert directory.stop_ids == (2, 7) and directory.template is not None
    assert written["adapter"] == written["whole"] != written["base"]


def test_an_adapter_without_files_of_its_own_takes_those_of_its_base(folder: Path) -> None:
    adapter = folder / "adapter"
    assert not list(adapter.glob("*token*")) and has_tokenizer(adapter)
    base = find_trained(str(adapter), "tools/sft.py")
    tokenizer = base_tokenizer(base, None)
    assert tokenizer is not None and tokenizer.fingerprint == Tokenizer.load(folder / "base").fingerprint
    assert end_ids(base.config, adapter) == (2, 7) and generation_facts(adapter)["top_p"] == 0.8


def test_fingerprints_tell_adapters_scales_and_bases_apart(folder: Path) -> None:
    def keys() -> tuple[str, str]:
        return ModelDirectory.open(str(folder / "adapter")).fingerprint, reference_key(folder / "adapter")

    seen = {keys()}
    change(folder / "adapter" / "adapter_config.json", lora_alpha=8)
    seen.add(keys())
    change_weights(folder / "adapter" / "adapter_model.safetensors", lambda w: [t.mul_(2) for t in w.values()])
    seen.add(keys())
    (folder / "adapter" / "adapted_config.json").unlink()  # else the change of the base is refused
    change_weights(folder / "base" / "model.safetensors", lambda w: [t.mul_(2) for t in w.values()])
    seen.add(keys())
    assert [len({pair[place] for pair in seen}) for place in (0, 1)] == [4, 4]


def test_a_base_with_other_weights_is_refused_and_a_copy_elsewhere_is_not(folder: Path) -> None:
    shutil.copytree(folder / "base", folder / "moved")
    change(folder / "adapter" / "adapter_config.json", base_model_name_or_path="../moved")
    assert require_model(folder / "adapter") == folder / "adapter"
    change_weights(folder / "moved" / "model.safetensors", lambda w: w["model.norm.weight"].add_(1))
    with pytest.raises(InputError, match="moved are not those that this adapter was trained on"):
        require_model(folder / "adapter")


def test_a_vocabulary_is_not_extended_on_a_base_with_other_weights(folder: Path) -> None:
    change_weights(folder / "base" / "model.safetensors", lambda w: w["model.norm.weight"].add_(1))
    words = ("--data", "texts.jsonl", "--extend", "base", "--vocab_size", 420, "--out", "wider", "--model", "adapter")
    (ended,) = run_tool("train_tokenizer", *words, cwd=folder)
    assert ended.code == 2 and "base are not those that this adapter was trained on" in ended.stderr, ended.stderr
    assert not (folder / "wider").exists()


def test_a_base_that_is_not_whole_is_refused(folder: Path) -> None:
    mark_complete(folder / "base", {"model.safetensors": 1}, 1, "pretrain")
    with pytest.raises(InputError, match=r"base/model.safetensors has \d+ bytes where 1 were written"):
        require_model(folder / "adapter")


def test_a_whole_model_in_the_place_of_an_adapter_leaves_nothing_of_it_and_the_other_way_round(folder: Path) -> None:
    place, config = folder / "adapter", load_config(folder / "base")
    write_model(place, config, read_model(folder / "base", config), torch.float32)
    assert {path.name for path in place.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    write_small_adapter(place, folder / "base", LoraSpec(1, 1.0))
    names = {"adapter_config.json", "adapted_config.json", "adapter_model.safetensors"}
    assert {path.name for path in place.iterdir()} == names


def test_an_adapter_cannot_replace_its_base(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot replace the model that it stands on"):
        write_small_adapter(folder / "base", folder / "base")
    assert (folder / "base" / "model.safetensors").exists()
