"""Fine-tune a model on the best of its own answers.

    torchrun --nproc-per-node 8 tools/rejection.py --model ckpt/sft --reward ckpt/rm --data prompts/ --rounds 4
    torchrun tools/rejection.py --reward my_rules:score --data prompts/ --select.by top --select.keep 100000
    python tools/rejection.py --reward ckpt/rm        # the bundled questions, on what tools/sft.py and tools/rm.py made

Without --data, --model and --config it works on ckpt/sft with the bundled questions, by the recipe
configs/demo_rejection.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.building import find_trained
from engine.launch import run, speak
from rlhf.rejection_config import RejectionConfig
from rlhf.rejection_job import rejection
from samples.bundle import bundled_prompts, sample_folder


def main(config: RejectionConfig) -> None:
    rejection(config)


def demo(config: RejectionConfig) -> None:
    """The same on the bundled prompts."""
    config.check()  # before anything is written
    find_trained(config.model, "tools/sft.py")
    speak("No --data: these are the bundled questions.")
    with sample_folder(config.out, config.dry_run) as folder:
        train, held_out = bundled_prompts(folder)
        config.data.paths, config.eval.data = [str(train)], [str(held_out)]
        rejection(config)


if __name__ == "__main__":
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    is_demo = not {"--data", "--data.paths", "--model", "--config"} & set(words)
    recipe = ROOT / "configs" / "demo_rejection.yaml" if is_demo else None
    run(demo if is_demo else main, RejectionConfig, aliases={"data": "data.paths"}, default_config=recipe)
