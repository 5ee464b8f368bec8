"""A small real tokenizer for all tests of the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.tokenizer import Tokenizer
from model.tokenizer_training import train_tokenizer
from samples.knowledge import load_knowledge
from samples.render import render_pretraining


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of the bundled sample."""
    train, _ = render_pretraining(load_knowledge())
    return [document.text for document in train]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts[:100], directory, vocab_size=2000, character_coverage=0.98)
    return Tokenizer.load(directory)


@pytest.fixture(scope="session")
def tokenizer_directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved_tokenizer")
    tokenizer.save(directory)
    return directory
