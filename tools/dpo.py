"""Improve a fine-tuned model by comparisons of answers, without a reward model.

    torchrun --nproc-per-node 8 tools/dpo.py --model ckpt/sft --data comparisons/ --out ckpt/dpo
    python tools/dpo.py                               # the bundled comparisons, on what tools/sft.py made

Without --data, --model and --config it trains ckpt/sft on the bundled comparisons, by the recipe configs/demo_dpo.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.building import find_trained
from engine.launch import run, speak
from rlhf.dpo_job import DpoConfig, dpo
from samples.bundle import bundled_preferences, sample_folder


def main(config: DpoConfig) -> None:
    dpo(config)


def demo(config: DpoConfig) -> None:
    """The same on the bundled comparisons."""
    config.check()  # before anything is written
    find_trained(config.model, "tools/sft.py")
    speak("No --data: these are the bundled comparisons.")
    with sample_folder(config.out, config.dry_run) as folder:
        train, held_out = bundled_preferences(folder)
        config.data.paths, config.eval.data = [str(train)], [str(held_out)]
        dpo(config)


if __name__ == "__main__":
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    is_demo = not {"--data", "--data.paths", "--model", "--config"} & set(words)
    recipe = ROOT / "configs" / "demo_dpo.yaml" if is_demo else None
    run(demo if is_demo else main, DpoConfig, aliases={"data": "data.paths"}, default_config=recipe)
