"""Train a reward model on comparisons of answers.

torchrun --nproc-per-node 8 tools/rm.py --model ckpt/sft --data comparisons/ --out ckpt/rm
python tools/rm.py --data pairs.jsonl --loss.kind plackett_luce
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.launch import run
from rlhf.reward_job import RmConfig, rm


def main(config: RmConfig) -> None:
    rm(config)


if __name__ == "__main__":
    run(main, RmConfig, aliases={"data": "data.paths"})
