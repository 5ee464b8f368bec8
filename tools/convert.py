"""Look at a model directory, bring one in, take one out, merge an adapter, or hold it to transformers.

    python tools/convert.py inspect DIR
    python tools/convert.py import DIR --out DIR [--dtype bfloat16] [--pad_vocab 64]
    python tools/convert.py export DIR --out DIR [--dtype bfloat16] [--max_shard_gb 5] [--step N]
    python tools/convert.py merge  DIR --out DIR [--dtype bfloat16] [--max_shard_gb 5]
    python tools/convert.py verify DIR [--against DIR] [--tolerance 1e-3]

Each names its options with --help. docs/convert.md tells more.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.conversion import export_model, import_model, merge_model
from engine.inspection import describe_model
from engine.launch import EXIT_GATE, EXIT_INPUT, run
from engine.verification import verify_model
from model.errors import InputError

DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class InspectConfig:
    """Say what a model directory holds, and what it lacks."""

    model: str | None = None
    """model directory; the word after inspect"""


@dataclass
class ImportConfig:
    """Write a Hugging Face directory as one that every job here begins from."""

    model: str | None = None
    """Hugging Face model directory; the word after import"""
    out: str | None = None
    """directory to write, a new one"""
    dtype: DType = "auto"
    """of the weights; auto keeps theirs"""
    pad_vocab: int = 1
    """make the vocabulary's rows a multiple of it, and enough for the tokenizer"""
    max_shard_gb: float = 5.0
    """size of one file in GB"""


@dataclass
class ExportConfig:
    """Write a run's model as a plain Hugging Face directory."""

    model: str | None = None
    """run or model directory; the word after export"""
    out: str | None = None
    """directory to write, a new one"""
    dtype: DType = "auto"
    """of the weights; auto keeps theirs"""
    step: int | None = None
    """take the weights of the run's checkpoint of this step, not those it has published"""
    max_shard_gb: float = 5.0
    """size of one file in GB"""


@dataclass
class MergeConfig:
    """Write an adapter and its base as one whole model."""

    model: str | None = None
    """directory of the adapter; the word after merge"""
    out: str | None = None
    """directory to write, a new one"""
    dtype: DType = "auto"
    """of the weights; auto keeps the base's"""
    max_shard_gb: float = 5.0
    """size of one file in GB"""


@dataclass
class VerifyConfig:
    """Compare what this project reads in a model directory with what transformers does."""

    model: str | None = None
    """model directory; the word after verify"""
    against: str | None = None
    """the directory that transformers opens, such as the one it was imported from; by default the same"""
    tolerance: float = 1e-3
    """largest difference of a logit in fp32 that passes"""


def main() -> None:
    words = sys.argv[1:]
    name = words[0] if words else ""
    if name in ("--help", "-h"):
        print(__doc__)
        sys.exit(0)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Begin with {', '.join(COMMANDS)}; see --help."
        found = f"{name!r} is not something to do here" if name else "Nothing says what to do"
        print(f"{found}. {hint}", file=sys.stderr)
        sys.exit(EXIT_INPUT)
    job, config_class = COMMANDS[name]
    has_directory = len(words) > 1 and not words[1].startswith("--")
    run(job, config_class, argv=["--model", *words[1:]] if has_directory else words[1:])


def inspect(config: InspectConfig) -> None:
    print(describe_model(_given(config.model, "a model directory", "inspect ckpt/sft")))


def bring_in(config: ImportConfig) -> None:
    example = "import BASE --out ours"
    source, out = _given(config.model, "a model directory", example), _given(config.out, "--out DIR", example)
    print(import_model(source, out, config.dtype, config.pad_vocab, config.max_shard_gb))


def take_out(config: ExportConfig) -> None:
    example = "export ckpt/sft --out served"
    source, out = _given(config.model, "a model directory", example), _given(config.out, "--out DIR", example)
    print(export_model(source, out, config.dtype, config.step, config.max_shard_gb))


def merge(config: MergeConfig) -> None:
    example = "merge ADAPTER --out whole"
    source, out = _given(config.model, "an adapter's directory", example), _given(config.out, "--out DIR", example)
    print(merge_model(source, out, config.dtype, config.max_shard_gb))


def verify(config: VerifyConfig) -> int:
    report = verify_model(
        _given(config.model, "a model directory", "verify ckpt/sft"), config.against, config.tolerance
    )
    print(report)
    return 0 if report.is_equal else EXIT_GATE


def _given(value: str | None, what: str, example: str) -> str:
    if value is None:
        raise InputError(f"Nothing says {what}. Give it, as in python tools/convert.py {example}.")
    return value


COMMANDS: dict[str, tuple[Any, type]] = {
    "inspect": (inspect, InspectConfig),
    "import": (bring_in, ImportConfig),
    "export": (take_out, ExportConfig),
    "merge": (merge, MergeConfig),
    "verify": (verify, VerifyConfig),
}


if __name__ == "__main__":
    main()
