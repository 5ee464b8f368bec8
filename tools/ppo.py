"""Improve a fine-tuned model by reinforcement learning: PPO, GRPO or RLOO.

    torchrun --nproc-per-node 8 tools/ppo.py --model ckpt/sft --reward ckpt/rm --data prompts/ --out ckpt/ppo
    torchrun tools/ppo.py --reward my_rules:score --data prompts/ --ppo.advantage group --rollout.samples 8
    torchrun tools/ppo.py --reward ckpt/rm            # the bundled questions, on what tools/sft.py has left

Without --data, --model and --config it improves ckpt/sft on the bundled questions, by the recipe configs/demo_ppo.yaml;
samples/gains.py tells what their true reward has gained.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.building import find_trained
from engine.launch import run, speak
from rlhf.ppo_config import PpoConfig
from rlhf.ppo_job import train_ppo
from samples.bundle import bundled_prompts, sample_folder


def main(config: PpoConfig) -> None:
    train_ppo(config)


def demo(config: PpoConfig) -> None:
    """The same on the bundled questions."""
    config.check()  # before anything is written
    find_trained(config.model, "tools/sft.py")
    speak("No --data: these are the bundled questions.")
    with sample_folder(config.out, config.dry_run) as folder:
        train, held_out = bundled_prompts(folder)
        config.data.paths, config.eval.data = [str(train)], [str(held_out)]
        train_ppo(config)


if __name__ == "__main__":
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    is_demo = not {"--data", "--data.paths", "--model", "--config"} & set(words)
    recipe = ROOT / "configs" / "demo_ppo.yaml" if is_demo else None
    aliases = {"data": "data.paths", "reward": "reward.source"}
    run(demo if is_demo else main, PpoConfig, aliases=aliases, default_config=recipe)
