"""Say what is in raw files or prepared directories, before anything is trained on them.

python tools/check_data.py --data PATH... [--tokenizer DIR] [--held_out PATH...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.data.check import check, render
from engine.data.progress import ProgressLine
from engine.data.sources import DataOptions
from engine.launch import run
from model.tokenizer import Tokenizer


@dataclass
class CheckConfig:
    """Report on raw files or prepared directories."""

    tokenizer: str | None = None
    """tokenizer or model directory, to count tokens of raw files"""
    held_out: list[str] = field(default_factory=list)
    """held-out files or prepared directories, to be looked for in the data"""
    verify: bool = False
    """compare every byte of prepared shards with what was written"""
    data: DataOptions = field(default_factory=DataOptions)


def main(config: CheckConfig) -> None:
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    progress = ProgressLine("Reading")
    print(render(check(config.data.paths, tokenizer, config.data, config.held_out, config.verify, progress)))


if __name__ == "__main__":
    run(main, CheckConfig, aliases={"data": "data.paths"})
