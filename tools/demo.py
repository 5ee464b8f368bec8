"""Run every stage there is on the bundled sample, printing the command of each as a user would type it.

    make demo

Some minutes on two CPU cores, no network. On a machine with a GPU the same commands use it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "ckpt/sample"

TOKENIZER = "ckpt/tokenizer"

STAGES = (
    ("Render the bundled facts to text", f"samples/render.py {SAMPLE}"),
    ("Train a tokenizer", f"tools/train_tokenizer.py --data {SAMPLE}/train.jsonl --out {TOKENIZER}"),
    (
        "Look at the data",
        f"tools/check_data.py --data {SAMPLE}/train.jsonl --held_out {SAMPLE}/held_out.jsonl --tokenizer {TOKENIZER}",
    ),
    ("What pre-training would do", f"tools/pretrain.py --tokenizer {TOKENIZER} --dry-run"),
    ("Pre-train", f"tools/pretrain.py --tokenizer {TOKENIZER}"),
)


def main() -> int:
    began = time.monotonic()
    for number, (title, command) in enumerate(STAGES, 1):
        print(f"\n[{number}/{len(STAGES)}] {title}\n$ python {command}", flush=True)
        code = subprocess.run([sys.executable, *command.split()], cwd=ROOT).returncode
        if code:
            return code
    print(f"\nDone in {time.monotonic() - began:.0f} s. ckpt/pretrain holds the model and its curves.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
