"""Pre-train a model on raw text.

    torchrun --nproc-per-node 8 tools/pretrain.py --model 7b --data corpus/ --out ckpt/pretrain
    python tools/pretrain.py                          # the bundled sample, on whatever is here

Without --data and --config it reads the bundled sample, and trains `tiny` by the recipe configs/demo_pretrain.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.launch import run, speak
from engine.pretraining import PretrainConfig, pretrain
from model.config import PRESETS
from samples.bundle import bundled_pretraining, sample_folder


def main(config: PretrainConfig) -> None:
    pretrain(config)


def demo(config: PretrainConfig) -> None:
    """The same on the bundled sample, for presets only: nobody means to train a trained base on it."""
    if config.data.paths or config.model not in PRESETS:
        return pretrain(config)
    config.check()  # before anything is written
    speak("No --data: this is the bundled sample.")
    with sample_folder(config.out, config.dry_run) as folder:
        train, held_out = bundled_pretraining(folder)
        config.data.paths, config.eval.data = [str(train)], [str(held_out)]
        pretrain(config)


if __name__ == "__main__":
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    is_demo = not {"--data", "--data.paths", "--config"} & set(words)
    # The recipe's batch and learning rate suit no other preset.
    is_tiny = "--model" not in words or words[words.index("--model") + 1 :][:1] == ["tiny"]
    recipe = ROOT / "configs" / "demo_pretrain.yaml" if is_demo and is_tiny else None
    run(demo if is_demo else main, PretrainConfig, aliases={"data": "data.paths"}, default_config=recipe)
