"""Fine-tune a model on conversations.

    torchrun --nproc-per-node 8 tools/sft.py --model ckpt/pretrain --data dialogues/ --out ckpt/sft
    python tools/sft.py                               # the bundled dialogues, on what tools/pretrain.py made

Without --data, --model and --config it fine-tunes ckpt/pretrain on the bundled dialogues, by the recipe
configs/demo_sft.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.building import find_trained
from engine.launch import run, speak
from engine.sft import SftConfig, sft
from samples.bundle import bundled_dialogues, sample_folder


def main(config: SftConfig) -> None:
    sft(config)


def demo(config: SftConfig) -> None:
    """The same on the bundled dialogues."""
    config.check()  # before anything is written
    find_trained(config.model, "tools/pretrain.py")
    speak("No --data: these are the bundled dialogues.")
    with sample_folder(config.out, config.dry_run) as folder:
        train, held_out = bundled_dialogues(folder)
        config.data.paths, config.eval.data = [str(train)], [str(held_out)]
        sft(config)


if __name__ == "__main__":
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    is_demo = not {"--data", "--data.paths", "--model", "--config"} & set(words)
    recipe = ROOT / "configs" / "demo_sft.yaml" if is_demo else None
    run(demo if is_demo else main, SftConfig, aliases={"data": "data.paths"}, default_config=recipe)
