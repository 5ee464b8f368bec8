"""Pre-train a model on raw text.

    torchrun --nproc-per-node 8 tools/pretrain.py --model 7b --data corpus/ --out ckpt/pretrain
    python tools/pretrain.py                          # the bundled sample, on whatever is here

Without --data and --config it runs the recipe configs/demo_pretrain.yaml on the bundled sample.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.launch import run
from engine.pretraining import PretrainConfig, pretrain
from samples.bundle import bundled_pretraining


def main(config: PretrainConfig) -> None:
    if not config.data.paths:
        train, held_out = bundled_pretraining(Path(config.out) / "sample")
        config.data.paths, config.eval.data = [str(train)], [str(held_out)]
    pretrain(config)


if __name__ == "__main__":
    names_a_recipe = any(word.split("=")[0] in ("--data", "--data.paths", "--config") for word in sys.argv)
    demo = None if names_a_recipe else ROOT / "configs" / "demo_pretrain.yaml"
    run(main, PretrainConfig, aliases={"data": "data.paths"}, default_config=demo)
