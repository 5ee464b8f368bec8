"""Model directories on disk: .bin and safetensors, whole, sharded, old, damaged, interrupted."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import weight_files
from model.config import parameter_shapes
from model.errors import InputError
from model.hf import hf_parameters, load_config, read_model, write_model
from tests.model.tiny import CONFIGS, LLAMA, causal_lm, loaded

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A directory with one file of weights."""
    write_model(tmp_path, LLAMA, causal_lm(LLAMA).named_parameters(), dtype=torch.float32)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_model(tmp_path, LLAMA, causal_lm(LLAMA).named_parameters(), dtype=torch.float32, max_shard_bytes=60_000)
    return tmp_path


def read(directory: Path) -> dict[str, torch.Tensor]:
    return dict(read_model(directory, load_config(directory)))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a directory with one file."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **facts: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def expect_same(directory: Path) -> None:
    """The directory still holds causal_lm(LLAMA)."""
    model, again = causal_lm(LLAMA), loaded(directory)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_safetensors_library_reads_what_we_write(whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    model = causal_lm(LLAMA)
    assert set(tensors) == {name for parts in hf_parameters(LLAMA).values() for name, _ in parts}
    q, k, v = model.model.layers[1].self_attn.qkv_proj.weight.split([48, 24, 24])
    gate, up = model.model.layers[1].mlp.gate_up_proj.weight.chunk(2)
    for part, expected in {
        "self_attn.q": q,
        "self_attn.k": k,
        "self_attn.v": v,
        "mlp.gate": gate,
        "mlp.up": up,
    }.items():
        assert torch.equal(tensors[f"model.layers.1.{part}_proj.weight"], expected)


def test_tensors_start_aligned_in_their_file(sharded: Path) -> None:
    """Readers map files and read vectors from the map."""
    for path in sharded.glob("*.safetensors"):
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_shards_are_named_indexed_and_bounded(sharded: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 2
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == LLAMA.num_parameters * 4
    for name, file in index["weight_map"].items():
        assert name in load_file(sharded / file)
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(sharded / file).values()) <= 60_000
    expect_same(sharded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_are_written_in_the_dtype_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    model = causal_lm(LLAMA)
    write_model(tmp_path, LLAMA, model.named_parameters(), dtype=dtype)
    for (name, tensor), parameter in zip(read(tmp_path).items(), model.parameters(), strict=True):
        assert tensor.dtype == dtype and torch.equal(tensor, parameter.to(dtype)), name
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_generation_config_names_the_special_tokens(tmp_path: Path) -> None:
    special = replace(LLAMA, bos_token_id=1, eos_token_id=(2, 3))
    write_model(tmp_path, special, causal_lm(special).named_parameters())
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 3]}


def test_tied_models_have_no_head_on_disk(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    write_model(tmp_path, config, causal_lm(config).named_parameters())
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    assert loaded(tmp_path).lm_head is None


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("in_shards", [False, True])
def test_bin_files_are_read(in_shards: bool, legacy: bool, whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    names = list(tensors)
    if in_shards:
        files = {name: f"pytorch_model-{1 + (i % 2):05d}-of-00002.bin" for i, name in enumerate(names)}
        (whole / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    else:
        files = dict.fromkeys(names, "pytorch_model.bin")
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        torch.save(part, whole / file, _use_new_zipfile_serialization=not legacy)
    expect_same(whole)


def test_safetensors_are_preferred_to_bin(whole: Path) -> None:
    (whole / "pytorch_model.bin").write_bytes(b"not looked at")
    expect_same(whole)


def test_old_rotary_buffers_are_passed_over(whole: Path) -> None:
    edit(whole, lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in (0, 1)}))
    expect_same(whole)


def test_a_second_copy_of_a_tied_head_is_passed_over_only_if_equal(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    write_model(tmp_path, config, causal_lm(config).named_parameters(), dtype=torch.float32)
    edit(tmp_path, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    assert loaded(tmp_path).lm_head is None
    edit(tmp_path, lambda t: t.update({HEAD: t[EMBEDDING] + 1}))
    with pytest.raises(InputError, match="tie_word_embeddings to false"):
        read(tmp_path)


def test_reading_takes_one_tensor_at_a_time(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    original = weight_files.TensorStore.read

    def counted(store: weight_files.TensorStore, name: str) -> torch.Tensor:
        reads.append(name)
        return original(store, name)

    monkeypatch.setattr(weight_files.TensorStore, "read", counted)
    stream = read_model(whole, LLAMA)
    assert reads == []
    for name, parts in hf_parameters(LLAMA).items():
        assert next(stream)[0] == name
        assert reads == [part for part, _ in parts]
        reads.clear()


def damage_truncate(directory: Path) -> None:
    path = next(iter(sorted(directory.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(directory: Path) -> None:
    next(iter(sorted(directory.glob("*.safetensors")))).write_bytes(b"\xff" * 64)


def damage_missing_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[1].unlink()


def damage_missing_in_shard(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    del tensors[HEAD]
    save_file(tensors, path)


def damage_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("{")


def damage_weight_map(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("{}")


def damage_file_names(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": 1}}')


def damage_no_weights(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()


def damage_pickle(directory: Path) -> None:
    damage_no_weights(directory)
    torch.save({"weight": Path("a path is no weight")}, directory / "pytorch_model.bin")


def damage_bin_content(directory: Path) -> None:
    damage_no_weights(directory)
    torch.save({"model": {"weight": torch.ones(1)}}, directory / "pytorch_model.bin")


def damage_bin(directory: Path) -> None:
    damage_no_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no more")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_truncate, r"model-00001-of-\d+.safetensors: not a whole safetensors file"),
        (damage_header, r"model-00001-of-\d+.safetensors: not a whole safetensors file"),
        (damage_missing_shard, r"model-00002-of-\d+.safetensors: this shard is listed in the index but missing"),
        (damage_missing_in_shard, "lm_head.weight is listed in the index but missing"),
        (damage_index, "index.json: not valid JSON"),
        (damage_weight_map, "weight_map is missing"),
        (damage_file_names, "weight_map is missing, or does not name files"),
        (damage_no_weights, "no weights here"),
        (damage_pickle, "pytorch_model.bin: not a whole file of weights"),
        (damage_bin_content, "pytorch_model.bin: holds more than named tensors"),
        (damage_bin, "pytorch_model.bin: not a whole file of weights"),
    ],
)
def test_damaged_files_are_named(damage: Callable[[Path], None], says: str, sharded: Path) -> None:
    damage(sharded)
    with pytest.raises(InputError, match=says):
        read_model(sharded, LLAMA)


@pytest.mark.parametrize("at", [0, -1])
def test_of_a_tensor_in_two_files_the_index_says_which(sharded: Path, at: int) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    other = sorted(sharded.glob("*.safetensors"))[at]
    name = next(name for name, file in index.items() if file != other.name)
    tensors = load_file(other)
    save_file({**tensors, name: load_file(sharded / index[name])[name] + 1}, other)
    expect_same(sharded)


def test_wrong_tensors_are_named_with_a_remedy(whole: Path) -> None:
    norm, down = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
    backup = (whole / "model.safetensors").read_bytes()

    def fails(change: Callable[[dict[str, torch.Tensor]], object], says: str) -> None:
        (whole / "model.safetensors").write_bytes(backup)
        edit(whole, change)
        with pytest.raises(InputError, match=says):
            read_model(whole, LLAMA)

    fails(lambda t: t.pop(norm), "model.norm.weight is missing")
    fails(lambda t: [t.pop(name) for name in list(t) if "layers.1." in name], "and 4 more are missing")
    fails(lambda t: t.pop(HEAD), "lm_head.weight is missing. If the head shares the embedding")
    fails(lambda t: t.update(extra=torch.ones(1)), "extra is not used")
    fails(lambda t: t.update({down: torch.ones(48, 81)}), r"down_proj.weight has shape \[48, 81\].*says \[48, 80\]")
    fails(lambda t: t.update({EMBEDDING: torch.ones(140, 48)}), "Set vocab_size to 140 in config.json")
    fails(lambda t: t.update({HEAD: torch.ones(140, 48)}), "lm_head.weight has shape.*Set vocab_size to 140")


def test_a_deeper_config_than_its_weights_is_refused(whole: Path) -> None:
    edit_config(whole, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"model.layers.2.input_layernorm.weight.* missing"):
        read(whole)
    edit_config(whole, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"model.layers.1.*are not used"):
        read(whole)


def test_directories_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: no such directory"):
        load_config(tmp_path / "absent")
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="not a JSON object"):
        load_config(tmp_path)


def test_writing_replaces_an_older_model_whole(sharded: Path) -> None:
    """Fewer, larger shards over many small ones: nothing of the old model stays."""
    config = CONFIGS["qwen3"]
    write_model(sharded, config, causal_lm(config).named_parameters())
    assert sorted(path.name for path in sharded.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert loaded(sharded).config == config


def test_a_write_that_fails_leaves_the_older_model_and_no_litter(whole: Path) -> None:
    before = sorted(path.name for path in whole.iterdir())

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(causal_lm(LLAMA).named_parameters())[:5]
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device"):
        write_model(whole, LLAMA, tensors(), dtype=torch.float32)
    assert sorted(path.name for path in whole.iterdir()) == before
    expect_same(whole)


def test_an_interrupted_swap_leaves_no_config_behind(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-swapped files must not pass for a model."""

    def dies(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        write_model(whole, LLAMA, causal_lm(LLAMA).named_parameters())
    with pytest.raises(InputError, match="no such file"):
        load_config(whole)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot write the model"):
        write_model(blocked / "model", LLAMA, causal_lm(LLAMA).named_parameters())


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """By the time the next tensor is asked for, nothing holds the one before."""
    alive: list[weakref.ref] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in parameter_shapes(LLAMA).items():
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = torch.zeros(shape)
            alive.append(weakref.ref(tensor))
            yield name, tensor

    write_model(tmp_path, LLAMA, tensors(), max_shard_bytes=60_000)
    assert len(alive) == len(parameter_shapes(LLAMA))


def test_wrong_order_is_our_own_mistake(tmp_path: Path) -> None:
    tensors = list(causal_lm(LLAMA).named_parameters())
    with pytest.raises(AssertionError, match="was due"):
        write_model(tmp_path, LLAMA, iter(tensors[::-1]))
    with pytest.raises(AssertionError):
        write_model(tmp_path, LLAMA, iter(tensors[:-1]))
    assert not list(tmp_path.iterdir())


def test_a_copy_of_the_directory_is_the_model_too(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("elsewhere") / "model"
    shutil.copytree(whole, copy)
    expect_same(copy)
