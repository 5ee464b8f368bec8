"""tools/convert.py: what goes in comes out, whole or not at all, and transformers agrees."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import engine.conversion
from engine.conversion import export_model, import_model
from engine.publish import MODEL_COMPLETE, require_model
from engine.verification import Report, verify_model
from model.chat import ChatTemplate
from model.errors import InputError
from model.hf import read_model
from model.tokenizer import Tokenizer
from tests.ranks import PATIENCE
from tests.small_base import write_small_base
from tests.tools.in_child import run_tool, start_tool
from tests.tools.small_job import pretrain, write_small_job


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of another stack: fp32, one file, 400 ids on 448 rows."""
    directory = write_small_base(tmp_path_factory.mktemp("original") / "base", context=256)
    tokenizer = Tokenizer.load(directory)
    ChatTemplate.named("chimed", tokenizer).store(tokenizer).save(directory)
    return directory


@pytest.fixture
def base(original: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(original, tmp_path / "base"))


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def change(directory: Path, file: str, **facts: object) -> None:
    """Set fields of a JSON file."""
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def change_weights(directory: Path, **changed: Tensor) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), **changed}, path)


def as_bin_shards(directory: Path) -> None:
    """Put two .bin files and their index in the place of the safetensors file, with the buffers of old times."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names, index = sorted(weights), dict[str, str]()
    for number, share in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in share}, directory / file)
        index |= dict.fromkeys(share, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def test_an_import_changes_no_bit_and_is_marked_as_whole(original: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in original.iterdir()}
    converted = import_model(original, tmp_path / "ours")
    assert are_equal(tensors(tmp_path / "ours"), tensors(original))
    assert json.loads((tmp_path / "ours" / MODEL_COMPLETE).read_text())["stage"] == "import"
    assert require_model(tmp_path / "ours") == tmp_path / "ours"
    assert str(converted).endswith("20,088 parameters in float32, 82.4 kB in 1 file")
    assert {path.name: path.read_bytes() for path in original.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_sharded_bin_files_give_what_safetensors_do(base: Path, original: Path, tmp_path: Path) -> None:
    as_bin_shards(base)
    import_model(base, tmp_path / "ours")
    assert are_equal(tensors(tmp_path / "ours"), tensors(original))


def test_there_and_back_again_is_equal_to_the_bit(base: Path, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in tensors(base).items()}
    save_file(half, base / "model.safetensors")
    import_model(base, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "theirs", max_shard_gb=2e-5)
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    assert are_equal(tensors(tmp_path / "theirs"), half)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not (tmp_path / "theirs" / MODEL_COMPLETE).exists()
    import_model(tmp_path / "theirs", tmp_path / "again")
    assert are_equal(tensors(tmp_path / "again"), half)


def test_an_export_opens_in_transformers_with_its_template_and_its_ends(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    change(base, "generation_config.json", eos_token_id=[2, 7], top_p=0.8)
    export_model(base, tmp_path / "theirs", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert model.generation_config.eos_token_id == [2, 7]
    assert model.generation_config.top_p == 0.8
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    messages = [{"role": "user", "content": "头晕"}]
    rendered = AutoTokenizer.from_pretrained(tmp_path / "theirs").apply_chat_template(messages, tokenize=False)
    assert rendered == "[human]:头晕\n"


def test_weights_of_several_dtypes_are_kept_in_one_that_holds_them_all(base: Path, tmp_path: Path) -> None:
    mixed = tensors(base)
    mixed = {name: tensor.half() if "mlp" in name else tensor.bfloat16() for name, tensor in mixed.items()}
    save_file(mixed, base / "model.safetensors")
    import_model(base, tmp_path / "ours")
    assert are_equal(tensors(tmp_path / "ours"), {name: tensor.float() for name, tensor in mixed.items()})


def test_weights_are_rounded_as_torch_rounds_them(original: Path, tmp_path: Path) -> None:
    import_model(original, tmp_path / "ours", "float16")
    assert are_equal(tensors(tmp_path / "ours"), {name: tensor.half() for name, tensor in tensors(original).items()})


def test_a_padded_vocabulary_keeps_its_rows_and_gets_their_mean(original: Path, tmp_path: Path) -> None:
    import_model(original, tmp_path / "ours", pad_vocab=100)
    old, new = (tensors(path)["model.embed_tokens.weight"] for path in (original, tmp_path / "ours"))
    assert old.shape == (448, 24) and new.shape == (500, 24)
    assert torch.equal(new[:448], old)
    torch.testing.assert_close(new[448:], old.double().mean(0).float().expand(52, 24))
    assert verify_model(tmp_path / "ours", original).is_equal


def test_a_tokenizer_with_more_ids_than_rows_gets_rows(base: Path, tmp_path: Path) -> None:
    change(base, "config.json", vocab_size=398)
    change_weights(base, **{"model.embed_tokens.weight": tensors(base)["model.embed_tokens.weight"][:398].clone()})
    with pytest.raises(InputError, match=r"its tokenizer has 400 ids, its weights only 398 rows. Give --pad_vocab 64"):
        import_model(base, tmp_path / "ours")
    import_model(base, tmp_path / "ours", pad_vocab=64)
    assert tensors(tmp_path / "ours")["model.embed_tokens.weight"].shape == (448, 24)


def test_a_sharded_checkpoint_is_exported_as_the_run_would_have_published_it(tmp_path: Path) -> None:
    write_small_job(tmp_path)
    pretrain(tmp_path, "run", world=2)
    for step in (2, 4):
        export_model(tmp_path / "run", tmp_path / f"step-{step}", step=step)
    assert are_equal(tensors(tmp_path / "step-4"), tensors(tmp_path / "run"))
    assert not are_equal(tensors(tmp_path / "step-2"), tensors(tmp_path / "run"))
    with pytest.raises(InputError, match=r"no checkpoint of step 3. Choose one of those it has: 2, 4."):
        export_model(tmp_path / "run", tmp_path / "step-3", step=3)


def test_one_tensor_is_held_at_a_time(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref] = []
    most = 0

    def watched(*args: object) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read_model(*args):  # type: ignore[arg-type]
            copy = tensor.clone()
            held.append(weakref.ref(copy))
            yield name, copy
            del tensor, copy
            nonlocal most
            most = max(most, sum(reference() is not None for reference in held))

    monkeypatch.setattr(engine.conversion, "read_model", watched)
    import_model(original, tmp_path / "ours", "bfloat16")
    assert len(held) == 14
    assert most <= 1


@pytest.mark.parametrize(
    ("value", "dtype", "sentence"),
    [
        (torch.nan, "auto", "model.norm.weight holds NaN or infinity"),
        (1e5, "float16", "model.norm.weight reaches 1e+05, more than float16 holds. Use --dtype bfloat16."),
    ],
)
def test_values_that_would_be_lost_are_refused(
    base: Path, tmp_path: Path, value: float, dtype: str, sentence: str
) -> None:
    change_weights(base, **{"model.norm.weight": torch.full((24,), value)})
    with pytest.raises(InputError) as refused:
        import_model(base, tmp_path / "ours", dtype)
    assert sentence in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("out", ["", ".", "..", "/", "new/.."])
def test_a_directory_without_a_name_of_its_own_is_refused(base: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "here").mkdir()
    with contextlib.chdir(tmp_path / "here"), pytest.raises(InputError, match="names no new directory"):
        import_model(base, out)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "here"}


def slow_down_casting() -> None:
    """Half a second a tensor."""
    cast = engine.conversion._cast

    def slowly(*args: object) -> Iterator[tuple[str, Tensor]]:
        for item in cast(*args):  # type: ignore[arg-type]
            time.sleep(0.5)
            yield item

    engine.conversion._cast = slowly  # type: ignore[assignment]


def test_a_conversion_that_is_killed_leaves_nothing_that_looks_whole(base: Path, tmp_path: Path) -> None:
    running = start_tool("convert", "import", "base", "--out", "ours", cwd=tmp_path, before=slow_down_casting)
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob(".ours.converting/.model.safetensors.tmp")):
        assert time.monotonic() < deadline, running.stderr()
        time.sleep(0.01)
    running.signal(0, signal.SIGKILL)
    assert running.wait()[0].code == -signal.SIGKILL
    assert not (tmp_path / "ours").exists()
    (ended,) = run_tool("convert", "import", "base", "--out", "ours", cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    assert are_equal(tensors(tmp_path / "ours"), tensors(base))
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".said")} == {"base", "ours"}


def outcome(report: Report) -> dict[str, bool]:
    return {check.name: check.is_equal for check in report.checks}


def test_verify_finds_a_model_equal_to_what_transformers_makes_of_it(original: Path) -> None:
    assert outcome(verify_model(original)) == dict.fromkeys(
        ("logits", "tokenizer", "chat template", "end tokens"), True
    )


def test_verify_finds_each_difference(base: Path, original: Path) -> None:
    damaged = tensors(base)["model.layers.1.mlp.down_proj.weight"].clone()
    damaged[3, 5] += 0.5
    change_weights(base, **{"model.layers.1.mlp.down_proj.weight": damaged})
    assert outcome(verify_model(base, original)) == {
        "logits": False,
        "tokenizer": True,
        "chat template": True,
        "end tokens": True,
    }
    shutil.copy(original / "model.safetensors", base)
    (base / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}</s>")
    change(base, "generation_config.json", eos_token_id=[2, 9])
    found = outcome(verify_model(base, original))
    assert found == {"logits": True, "tokenizer": True, "chat template": False, "end tokens": False}
    table = json.loads((base / "tokenizer.json").read_text())
    table["normalizer"] = {"type": "Lowercase"}
    (base / "tokenizer.json").write_text(json.dumps(table))
    assert not outcome(verify_model(base, original))["tokenizer"]


def test_verify_takes_models_of_any_context(base: Path) -> None:
    change(base, "config.json", max_position_embeddings=16)
    assert outcome(verify_model(base))["logits"]


@pytest.mark.parametrize("size", [0, -1, math.nan, math.inf])
def test_a_size_of_shards_that_is_none_is_refused(base: Path, tmp_path: Path, size: float) -> None:
    with pytest.raises(InputError, match=f"--max_shard_gb is {size}"):
        import_model(base, tmp_path / "ours", max_shard_gb=size)


def test_nan_is_a_difference(base: Path) -> None:
    change_weights(base, **{"model.norm.weight": torch.full((24,), torch.nan)})
    assert not outcome(verify_model(base))["logits"]


def test_verify_ends_with_4_where_a_tensor_is_damaged(base: Path, original: Path) -> None:
    change_weights(base, **{"model.norm.weight": torch.full((24,), 1.5)})
    (ended,) = run_tool("convert", "verify", "base", "--against", original, cwd=base.parent)
    assert ended.code == 4
    assert [line.split("  ")[0] for line in ended.stdout.splitlines() if "DIFFERS" in line] == ["logits"]


def test_inspect_says_what_is_there_and_what_is_not(base: Path) -> None:
    (ended,) = run_tool("convert", "inspect", "base", cwd=base.parent)
    assert ended.code == 0, ended.stderr
    shown = " ".join(ended.stdout.split())
    for fact in (
        "LlamaForCausalLM: 2 layers of width 24, 2 heads of 8 (1 for keys and values), feed-forward 48, tied head",
        "parameters 20,088: embedding 10,752, norms 120, feed-forward 6,912, attention 2,304",
        "F32, 82.4 kB in 1 file",
        "256 tokens, rope theta 10000",
        "400 ids of 448 rows; SentencePiece BPE",
        "bos <s> 1, eos </s> 2",
        "chat template chimed",
        "weights 40.2 kB in bfloat16, 80.4 kB in float32",
        "missing nothing",
    ):
        assert fact in shown
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        (base / name).unlink()
    (base / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    change(base, "config.json", architectures=["LlamaForSequenceClassification"], num_labels=1, eos_token_id=5)
    (ended,) = run_tool("convert", "inspect", "base", cwd=base.parent)
    assert ended.code == 0, ended.stderr
    assert "LlamaForSequenceClassification: 2 layers" in ended.stdout
    assert "base: no weights here." in ended.stdout
    assert "config.json ends answers at [5], the tokenizer at 2." in ended.stdout


def test_a_word_that_is_no_command_gets_the_nearest_one(tmp_path: Path) -> None:
    (ended,) = run_tool("convert", "exprt", "base", cwd=tmp_path)
    assert (ended.code, ended.last_line) == (2, "'exprt' is not something to do here. Did you mean export?")
