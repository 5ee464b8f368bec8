"""Train a reward model on comparisons of answers.

    torchrun --nproc-per-node 8 tools/rm.py --model ckpt/sft --data comparisons/ --out ckpt/rm
    python tools/rm.py --data pairs.jsonl --loss.kind plackett_luce
    python tools/rm.py                                # the bundled comparisons, on what tools/sft.py has left

Without --data, --model and --config it judges the bundled questions' answers, starting from ckpt/sft, by the recipe
configs/demo_rm.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.building import find_trained
from engine.launch import run, speak
from rlhf.reward_job import RmConfig, rm
from samples.bundle import bundled_preferences, bundled_prompts, sample_folder


def main(config: RmConfig) -> None:
    rm(config)


def demo(config: RmConfig) -> None:
    """The same on the bundled comparisons, normalised by the answers of held-out conversations."""
    config.check()  # before anything is written
    find_trained(config.model, "tools/sft.py", head=None)
    speak("No --data: these are the bundled comparisons.")
    with sample_folder(config.out, config.dry_run) as folder:
        train, held_out = bundled_preferences(folder)
        _, answered = bundled_prompts(folder / "prompts")
        config.data.paths, config.eval.data = [str(train)], [str(held_out)]
        config.normalise.data = [str(answered)]
        rm(config)


if __name__ == "__main__":
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    is_demo = not {"--data", "--data.paths", "--model", "--config"} & set(words)
    recipe = ROOT / "configs" / "demo_rm.yaml" if is_demo else None
    run(demo if is_demo else main, RmConfig, aliases={"data": "data.paths"}, default_config=recipe)
