"""Improve a fine-tuned model by reinforcement learning: PPO, GRPO or RLOO.

    torchrun --nproc-per-node 8 tools/ppo.py --model ckpt/sft --reward ckpt/rm --data prompts/ --out ckpt/ppo
    torchrun tools/ppo.py --reward my_rules:score --data prompts/ --ppo.advantage group --rollout.samples 8
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.launch import run
from rlhf.ppo_config import PpoConfig
from rlhf.ppo_job import train_ppo


def main(config: PpoConfig) -> None:
    train_ppo(config)


if __name__ == "__main__":
    run(main, PpoConfig, aliases={"data": "data.paths", "reward": "reward.source"})
