"""Run every stage there is on the bundled sample, printing the command of each as a user would type it.

    make demo

Some minutes on two CPU cores, no network. On a machine with a GPU the same commands use it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samples.ranking import ranking

SAMPLE = "ckpt/sample"

TOKENIZER = "ckpt/tokenizer"


class Stage(NamedTuple):
    title: str
    command: str
    typed: str = ""  # what goes into its stdin


STAGES = (
    Stage("Render the bundled facts to texts and conversations", f"samples/render.py {SAMPLE}"),
    Stage("Train a tokenizer", f"tools/train_tokenizer.py --data {SAMPLE}/train.jsonl --out {TOKENIZER}"),
    Stage(
        "Look at the texts",
        f"tools/check_data.py --data {SAMPLE}/train.jsonl --held_out {SAMPLE}/held_out.jsonl --tokenizer {TOKENIZER}",
    ),
    Stage("What pre-training would do", f"tools/pretrain.py --tokenizer {TOKENIZER} --dry-run"),
    Stage("Pre-train", f"tools/pretrain.py --tokenizer {TOKENIZER}"),
    Stage(
        "Look at the conversations",
        f"tools/check_data.py --data {SAMPLE}/dialogues/train.jsonl --held_out {SAMPLE}/dialogues/held_out.jsonl "
        "--model ckpt/pretrain",
    ),
    Stage("Fine-tune, and answer held-out questions", "tools/sft.py"),
    # Two of those questions: answers to what training has shown would prove little.
    Stage(
        "Ask for a department",
        "tools/chat.py --sampling.temperature 0",
        "医生，我妹妹便秘、颜面水肿、记忆力减退，看什么科好？",
    ),
    Stage(
        "Ask for a drug",
        "tools/chat.py --sampling.temperature 0",
        "医生，我是51岁的女性，患荨麻疹，抗组胺止痒用什么药？",
    ),
    Stage("Train a reward model on comparisons of answers", "tools/rm.py"),
    Stage("Improve the answers by PPO", "tools/ppo.py --reward ckpt/rm"),
    Stage("Improve them by rejection sampling", "tools/rejection.py --reward ckpt/rm"),
    Stage(
        "Evaluate every model on bundled questions",
        "tools/evaluate_model.py --model ckpt/pretrain ckpt/sft ckpt/ppo ckpt/rejection --reward ckpt/rm",
    ),
)


def main() -> int:
    began = time.monotonic()
    for number, (title, command, typed) in enumerate(STAGES, 1):
        shown = f"echo '{typed}' | python {command}" if typed else f"python {command}"
        print(f"\n[{number}/{len(STAGES)}] {title}\n$ {shown}", flush=True)
        stdin = f"{typed}\n".encode() if typed else None
        code = subprocess.run([sys.executable, *command.split()], cwd=ROOT, input=stdin).returncode
        if code:
            return code
    print("\nBy each task's first metric: < is surely worse than the next, > surely better, ~ not surely either.")
    print("\n".join(ranking(ROOT / "ckpt" / "evaluation" / "report.json")))
    print(f"\nDone in {time.monotonic() - began:.0f} s. ckpt/sft holds the model; python tools/chat.py talks to it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
