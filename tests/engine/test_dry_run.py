"""A look at the data before a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.data.sources import ReadOptions
from engine.dry_run import look_at_data
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer_training import train_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    train_tokenizer(["高血压患者应低盐饮食。"], tmp_path / "tokenizer", 280)
    return Tokenizer.load(tmp_path / "tokenizer")


@pytest.mark.parametrize("has_tokenizer", [True, False])
@pytest.mark.parametrize("content", ["", "\n\n", "太短"])
def test_files_without_a_document_are_named(
    tmp_path: Path, tokenizer: Tokenizer, content: str, has_tokenizer: bool
) -> None:
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for path in paths:
        Path(path).write_text(content)
    expected = f"{paths[0]}, {paths[1]}: there is no document to read. Give --data other files."
    with pytest.raises(InputError) as raised:
        look_at_data(paths, ReadOptions(), tokenizer if has_tokenizer else None, 280, 64)
    assert str(raised.value) == expected


def test_one_document_is_shown_and_tokens_are_estimated(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("高血压患者应低盐饮食。")
    look = look_at_data([str(tmp_path / "a.txt")], ReadOptions(), tokenizer, 280, 64)
    assert not look.is_exact
    assert look.tokens == len(tokenizer.encode("高血压患者应低盐饮食。"))
    assert "低盐饮食" in look.sample.replace("|", "")
