"""From what a user names to corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.corpora import DataConfig, open_data
from tests.engine.data.stand_in import Bytes


def test_what_became_of_raw_documents_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["高血压患者应低盐饮食。", "句。\n" * 2000, "句。\n" * 800, "短"]
    lines = [*(json.dumps({"text": text}) for text in texts), '{"text": ']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer: Any = Bytes()
    config = DataConfig(paths=[str(tmp_path / "a.jsonl")], max_characters=1000, workers=1)
    corpus = open_data(config, tokenizer, tmp_path)
    said = capsys.readouterr().err.splitlines()[-3:]
    assert said[0] == f"Files read: 1 utf-8; {len(corpus.store)} documents."
    assert said[1].startswith("Left out: 1 too short, 1 malformed (")
    assert said[2] == "Longer than --data.max_characters 1000 and stored in pieces: 2 documents."
