"""A model takes on the rows of an extended vocabulary, and nothing else of it changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import PRESETS, parameter_shapes
from model.errors import InputError
from model.hf import load_config, read_model, write_model
from model.lora import LoraSpec
from model.tokenizer import Tokenizer
from model.tokenizer_extension import extend_tokenizer, extended_rows
from model.tokenizer_resize import extend_rows, resize_model
from tests.model.tokenizer_bases import write_llama
from tests.small_adapter import write_small_adapter

HEADS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    old = Tokenizer.load(write_llama(folder / "old", character_coverage=0.98))
    words = ["高血压病人", "心力衰竭", "对乙酰氨基酚", "过敏性休克"]
    extend_tokenizer(folder / "old", words, folder / "new", old.vocab_size + 20)
    return old, Tokenizer.load(folder / "new")


def write_tiny(directory: Path, rows: int, is_tied: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    config = replace(PRESETS["tiny"], vocab_size=rows, num_layers=1, tie_word_embeddings=is_tied)
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(config)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    write_model(directory, config, iter(tensors.items()), dtype)
    return tensors


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_means_of_the_pieces_they_replace(
    is_tied: bool, dtype: torch.dtype, tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path
) -> None:
    old, new = tokenizers
    before = write_tiny(tmp_path / "old", old.padded_vocab_size, is_tied, dtype)
    rows = resize_model(tmp_path / "old", old, new, tmp_path / "new")
    config = load_config(tmp_path / "new")
    assert rows == config.vocab_size == new.padded_vocab_size and rows % 64 == 0
    after = dict(read_model(tmp_path / "new", config))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        if name not in HEADS:
            assert torch.equal(after[name], tensor)
            continue
        assert torch.equal(after[name][: old.vocab_size], tensor[: old.vocab_size])
        for index in range(old.vocab_size, new.vocab_size):
            spelling = old.encode("\n" + new.decode([index]))[-len(old.split(new.piece(index))) :]
            mean = sum(tensor[piece].float() for piece in spelling) / len(spelling)
            torch.testing.assert_close(after[name][index], mean.to(dtype))
        mean = tensor[: old.vocab_size].float().mean(0).to(dtype)
        for row in after[name][new.vocab_size :]:
            torch.testing.assert_close(row, mean)
    assert Tokenizer.load(tmp_path / "new").fingerprint == new.fingerprint


def test_an_adapter_is_merged_into_rows_of_its_bases_dtype(
    tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path
) -> None:
    """Its own weights are fp32, the embedding among them where that was trained whole."""
    old, new = tokenizers
    write_tiny(tmp_path / "base", old.padded_vocab_size, False, torch.bfloat16)
    spec = LoraSpec(2, 4.0, trained=("embed_tokens", "lm_head"))
    write_small_adapter(tmp_path / "adapter", tmp_path / "base", spec)
    resize_model(tmp_path / "adapter", old, new, tmp_path / "new")
    assert load_config(tmp_path / "new").vocab_size == new.padded_vocab_size
    merged = dict(read_model(tmp_path / "adapter", load_config(tmp_path / "adapter")))
    after = dict(read_model(tmp_path / "new", load_config(tmp_path / "new")))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, merged[name].bfloat16()) for name, tensor in after.items() if name not in HEADS)
    for place in ("adapter", "base"):
        with pytest.raises(InputError, match=f"{place}: the resized model cannot replace the one it is read from"):
            resize_model(tmp_path / "adapter", old, new, tmp_path / place)


def test_transformers_opens_the_resized_model(tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    old, new = tokenizers
    write_tiny(tmp_path / "old", old.padded_vocab_size, False, torch.float32)
    resize_model(tmp_path / "old", old, new, tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    ids = AutoTokenizer.from_pretrained(tmp_path / "new")("高血压病人<human>", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [new.bos_id, *new.encode("高血压病人<human>", allow_special=True)]
    assert model(ids).logits.shape == (1, ids.shape[1], new.padded_vocab_size)


def test_no_padding_row_is_likelier_than_the_average_token() -> None:
    head = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    extended = extend_rows(head, {100: [3, 4]}, old_size=100, num_rows=128)
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    weights = (hidden @ extended.T).exp()  # unnormalised probabilities, [50, 128]
    assert (weights[:, 101:] <= weights[:, :100].mean(1, keepdim=True) * (1 + 1e-5)).all()


def test_rows_of_an_id_without_a_spelling_are_the_mean_of_all() -> None:
    weight = torch.arange(8.0).reshape(4, 2)
    extended = extend_rows(weight, {4: [], 5: [0, 1]}, old_size=4, num_rows=6)
    assert extended[4].tolist() == [3.0, 4.0] and extended[5].tolist() == [1.0, 2.0]


def test_a_model_with_more_rows_than_needed_keeps_their_number(
    tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path
) -> None:
    old, new = tokenizers
    write_tiny(tmp_path / "old", 1000, False, torch.float32)
    assert resize_model(tmp_path / "old", old, new, tmp_path / "new") == 1000


def test_a_model_of_another_tokenizer_is_refused(tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path) -> None:
    old, new = tokenizers
    assert len(extended_rows(old, new)) == 20
    write_tiny(tmp_path / "old", old.vocab_size - 1, False, torch.float32)
    with pytest.raises(InputError, match=f"{old.vocab_size - 1} rows, its tokenizer {old.vocab_size} ids"):
        resize_model(tmp_path / "old", old, new, tmp_path / "new")
    with pytest.raises(InputError, match="cannot replace the one it is read from"):
        resize_model(tmp_path / "old", old, new, tmp_path / "old")
