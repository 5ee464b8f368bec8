"""The command: from files to a tokenizer directory, and from a base to an extended one with its model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import PRESETS, parameter_shapes
from model.hf import load_config, read_model, write_model
from model.tokenizer import Tokenizer
from tests.model.tokenizer_bases import sentences, write_llama
from tests.ranks import PATIENCE
from tests.small_adapter import write_small_adapter

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    records = [
        json.dumps({"text": text + ("\u2581" if number == 7 else "")}) for number, text in enumerate(sentences(0, 300))
    ]
    path.write_text("\n".join(records), encoding="utf-8")
    return path


def test_raw_files_become_a_tokenizer_and_a_report(corpus: Path, tmp_path: Path) -> None:
    done = run("--data", corpus, "--vocab_size", 460, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Tokenizer.load(tmp_path / "out").vocab_size == 460
    assert "460 ids, 512 model rows" in done.stdout
    assert "300 documents, 0 of them changed" in done.stdout
    assert "1 hold a literal U+2581" in done.stdout


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_tiny(directory: Path, rows: int) -> Path:
    """A model's weights and configuration."""
    config = replace(PRESETS["tiny"], vocab_size=rows, num_layers=1)
    tensors = ((name, torch.ones(shape)) for name, shape in parameter_shapes(config).items())
    write_model(directory, config, tensors, torch.float32)
    return directory


def test_a_base_and_its_model_are_extended_together(corpus: Path, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    old = Tokenizer.load(base)
    write_tiny(base, old.padded_vocab_size)
    size = old.vocab_size + 100
    options = ["--extend", base, "--model", base, "--vocab_size", size, "--out", tmp_path / "out"]
    done = run("--data", corpus, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"100 from id {old.vocab_size}" in done.stdout
    compression = re.search(r"([\d.]+) characters per token, ([\d.]+) before", done.stdout)
    assert compression is not None and float(compression[1]) > 1.5 * float(compression[2])
    extended = load_config(tmp_path / "out")
    assert extended.vocab_size % 64 == 0 and extended.vocab_size >= size
    assert dict(read_model(tmp_path / "out", extended))["model.embed_tokens.weight"].shape[0] == extended.vocab_size
    assert Tokenizer.load(tmp_path / "out").vocab_size == size


def test_the_same_command_again_leaves_what_it_made_and_any_other_is_refused(corpus: Path, tmp_path: Path) -> None:
    base, out = write_llama(tmp_path / "base"), tmp_path / "out"
    other = tmp_path / "other.txt"
    other.write_text("\n".join(sentences(400, 700)), encoding="utf-8")
    sizes = {"new": 460, "extended": Tokenizer.load(base).vocab_size + 50}
    for name, options in (("new", []), ("extended", ["--extend", base])):
        command = ["--vocab_size", sizes[name], "--out", out / name, *options]
        assert run("--data", corpus, *command, cwd=tmp_path).returncode == 0
        made = files(out / name)
        again = run("--data", corpus, *command, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert "It stays" in again.stderr and f"{sizes[name]:,} ids" in again.stdout
        for words in (["--data", other, *command], ["--data", corpus, *command, "--vocab_size", sizes[name] + 1]):
            refused = run(*words, cwd=tmp_path)
            assert refused.returncode == 2 and refused.stdout == ""
            assert refused.stderr.splitlines()[-1].startswith(f"--out {out / name} exists, and nothing is overwritten.")
        assert files(out / name) == made and [path.name for path in out.iterdir()].count(f".{name}.converting") == 0


def test_a_base_is_not_replaced_by_what_it_is_extended_to_whatever_path_leads_there(
    corpus: Path, tmp_path: Path
) -> None:
    base = write_llama(tmp_path / "base")
    write_small_adapter(tmp_path / "adapter", write_tiny(base, Tokenizer.load(base).padded_vocab_size))
    (tmp_path / "link").symlink_to("base")
    before, size = files(base), Tokenizer.load(base).vocab_size + 100
    for model, out in ((base, base), (base, "base/"), (base, "link"), ("link", base), ("adapter", base)):
        words = ("--extend", base, "--model", model, "--vocab_size", size, "--out", out)
        done = run("--data", corpus, *words, cwd=tmp_path)
        assert done.returncode == 2 and "is read from there, and would be replaced" in done.stderr.splitlines()[-1]
        assert "Reading" not in done.stderr and files(base) == before


def test_without_data_the_bundled_sample_is_read(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Tokenizer.load(tmp_path / "ckpt" / "tokenizer").vocab_size == 4096


def test_what_cannot_work_ends_with_code_2_and_a_remedy(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cases = [
        (["--vocab_size", 10**6], "at most"),
        (["--vocab_size", 100], "at least"),
        (["--model", tmp_path], "Give --extend"),
        (["--extend", tmp_path, "--vocab_size", 900], "Give a tokenizer directory"),
        (["--out", tmp_path / "file"], "Choose another, or remove it first"),
        (["--out", tmp_path / "file" / "out"], "Move it, or choose another --out"),
    ]
    for options, message in cases:
        done = run("--data", corpus, "--out", tmp_path / "out", *options, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (options, done.stderr)
        assert message in done.stderr.splitlines()[-1], (options, done.stderr)
