"""Run every stage there is on the bundled sample, printing the command of each as a user would type it.

    make demo

Some minutes on two CPU cores, no network. On a machine with a GPU the same commands use it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "ckpt/sample"

STAGES: tuple[tuple[str, list[str]], ...] = (
    ("Render the bundled facts to text", ["samples/render.py", SAMPLE]),
    ("Train a tokenizer", ["tools/train_tokenizer.py", "--data", f"{SAMPLE}/train.jsonl", "--out", "ckpt/tokenizer"]),
    (
        "Look at the data",
        ["tools/check_data.py", "--data", f"{SAMPLE}/train.jsonl", "--held_out", f"{SAMPLE}/held_out.jsonl"]
        + ["--tokenizer", "ckpt/tokenizer"],
    ),
    ("What pre-training would do", ["tools/pretrain.py", "--tokenizer", "ckpt/tokenizer", "--dry-run"]),
    ("Pre-train", ["tools/pretrain.py", "--tokenizer", "ckpt/tokenizer"]),
)


def main() -> int:
    began = time.monotonic()
    for number, (title, words) in enumerate(STAGES, 1):
        print(f"\n[{number}/{len(STAGES)}] {title}\n$ python {shlex.join(words)}", flush=True)
        code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
        if code:
            return code
    print(
        f"\nDone in {time.monotonic() - began:.0f} s. The model is in ckpt/pretrain; its curves are in curves.png there."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
