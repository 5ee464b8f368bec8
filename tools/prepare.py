"""Tokenise raw text once, into memory-mapped shards that any number of runs can train on.

    python tools/prepare.py --data PATH... --tokenizer DIR --out DIR
    python tools/prepare.py --data PATH... --tokenizer DIR --out DIR --part 3/16     one of 16 independent jobs

Interrupted, it goes on where it was. Give --out to tools/pretrain.py as --data; the parts of one --out count as one.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.data.prepare import prepare
from engine.data.progress import ProgressLine
from engine.data.shards import read_manifest
from engine.data.sources import DataOptions
from engine.launch import run, speak
from model.errors import InputError
from model.tokenizer import Tokenizer


@dataclass
class PrepareConfig:
    """Tokenise raw text into memory-mapped shards."""

    tokenizer: str = "ckpt/tokenizer"
    """tokenizer or model directory"""
    out: str = "prepared"
    """directory to write; with --part, a directory in it"""
    part: str = "1/1"
    """i/n: do the i-th of n independent shares of the work, i from 1"""
    workers: int | None = None
    """processes; by default one a core"""
    data: DataOptions = field(default_factory=DataOptions)


def main(config: PrepareConfig) -> None:
    part = re.fullmatch(r"(\d+)/(\d+)", config.part)
    if part is None:
        raise InputError(f"--part {config.part}: give it as i/n, such as 3/16.")
    if config.workers is not None and config.workers < 1:
        raise InputError(f"--workers {config.workers}: give at least 1.")
    tokenizer = Tokenizer.load(config.tokenizer)
    directory = prepare(
        config.data.paths,
        tokenizer,
        config.out,
        config.data,
        (int(part[1]), int(part[2])),
        config.workers,
        ProgressLine("Preparing"),
    )
    manifest = read_manifest(directory)
    if manifest["rejected"]:
        speak(
            f"{manifest['rejected']:,} malformed records were skipped; "
            f"{directory / 'rejects.jsonl'} says which and why."
        )
    print(f"documents    {manifest['documents']:,}, {manifest['short']:,} too short ones left out")
    print(f"characters   {manifest['characters']:,}")
    print(f"tokens       {manifest['tokens']:,}")
    print(f"encodings    {', '.join(f'{count:,} {name}' for name, count in manifest['encodings'].items())}")
    print(f"rejected     {manifest['rejected']:,}")
    print(f"fingerprint  {manifest['fingerprint']}")
    print(f"prepared     {directory}")


if __name__ == "__main__":
    run(main, PrepareConfig, aliases={"data": "data.paths"})
