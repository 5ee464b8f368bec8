"""The stages, in their order, each with the command that a user would type, and running them.

What is done is written down (`Ledger`), so a chain that was interrupted goes on with the stage that it was in, which
goes on from what it has kept of its own work.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from engine.files import write_durably

ROOT = Path(__file__).resolve().parents[2]
SAMPLE, TOKENIZER = "ckpt/sample", "ckpt/tokenizer"
MEMORY_GB = 4.0
"""What no stage may take more of."""


class Stage(NamedTuple):
    """One command.

    budget: seconds on two CPU cores that have nothing else to do.
    leaves: what is there when it is done, below the folder that it runs in; "" for nothing.
    typed: what goes into its stdin.
    """

    name: str
    title: str
    command: str
    budget: int
    leaves: str = ""
    typed: str = ""

    @property
    def shown(self) -> str:
        return f"echo '{self.typed}' | python {self.command}" if self.typed else f"python {self.command}"


STAGES = (
    Stage("sample", "Render the bundled facts to texts and conversations", f"samples/render.py {SAMPLE}", 10, SAMPLE),
    Stage(
        "tokenizer",
        "Train a tokenizer",
        f"tools/train_tokenizer.py --data {SAMPLE}/train.jsonl --out {TOKENIZER}",
        8,
        TOKENIZER,
    ),
    Stage(
        "look",
        "Look at the texts",
        f"tools/check_data.py --data {SAMPLE}/train.jsonl --held_out {SAMPLE}/held_out.jsonl --tokenizer {TOKENIZER}",
        6,
    ),
    Stage("pretrain", "Pre-train", f"tools/pretrain.py --tokenizer {TOKENIZER}", 120, "ckpt/pretrain"),
    Stage("sft", "Fine-tune on conversations", "tools/sft.py", 135, "ckpt/sft"),
    Stage("rm", "Train a reward model on comparisons of answers", "tools/rm.py", 60, "ckpt/rm"),
    Stage(
        "rejection",
        "Improve the answers by rejection sampling",
        "tools/rejection.py --reward ckpt/rm",
        55,
        "ckpt/rejection",
    ),
    Stage("ppo", "Improve the answers by PPO", "tools/ppo.py --reward ckpt/rm", 80, "ckpt/ppo"),
    Stage(
        "evaluation",
        "Evaluate every model on held-out questions, notes and conversations",
        "tools/evaluate_model.py --model ckpt/pretrain ckpt/sft ckpt/rejection ckpt/ppo --reward ckpt/rm",
        60,
        "ckpt/evaluation/report.json",
    ),
    # A question that training has not shown.
    Stage(
        "ask",
        "Ask for a department",
        "tools/chat.py --model ckpt/ppo --sampling.temperature 0",
        6,
        typed="医生，我妹妹便秘、颜面水肿、记忆力减退，看什么科好？",
    ),
)


RANK = "--lora.rank 8"
# Fine-tuning stands on what pre-training has left, everything behind it on what fine-tuning all weights has left.
ADAPTER_STAGES = (
    Stage("dpo", "Improve the answers by DPO", "tools/dpo.py", 95, "ckpt/dpo"),
    Stage("lora-sft", "Fine-tune adapters", f"tools/sft.py {RANK} --out ckpt/lora-sft", 135, "ckpt/lora-sft"),
    Stage("lora-rm", "Train adapters to judge", f"tools/rm.py {RANK} --out ckpt/lora-rm", 65, "ckpt/lora-rm"),
    Stage(
        "lora-rejection",
        "Adapters by rejection sampling",
        f"tools/rejection.py --reward ckpt/lora-rm {RANK} --out ckpt/lora-rejection",
        55,
        "ckpt/lora-rejection",
    ),
    Stage(
        "lora-ppo",
        "Adapters by PPO",
        f"tools/ppo.py --reward ckpt/lora-rm {RANK} --out ckpt/lora-ppo",
        90,
        "ckpt/lora-ppo",
    ),
    Stage("lora-dpo", "Adapters by DPO", f"tools/dpo.py {RANK} --out ckpt/lora-dpo", 90, "ckpt/lora-dpo"),
    Stage(
        "lora-evaluation",
        "Evaluate them beside the models whose weights were all trained",
        "tools/evaluate_model.py --model ckpt/sft ckpt/lora-sft ckpt/rejection ckpt/lora-rejection ckpt/ppo "
        "ckpt/lora-ppo ckpt/dpo ckpt/lora-dpo --reward ckpt/rm --out ckpt/lora-evaluation",
        150,
        "ckpt/lora-evaluation/report.json",
    ),
)
"""What `tools/demo.py --lora` runs behind STAGES."""


@dataclass(frozen=True)
class Done:
    """A stage that has ended. seconds: of the call that ended it; gigabytes: the most memory that it held at once."""

    name: str
    command: str
    seconds: float
    gigabytes: float


class Ledger:
    """What is done, in a file. A stage counts while its command is the same, what it left is there, and all before do.

    Args:
        root: the folder in which the stages run.
    """

    def __init__(self, root: Path, stages: Sequence[Stage]) -> None:
        self._path, self._root, self._stages = root / "ckpt" / "demo.json", root, stages

    def read(self) -> list[Done]:
        """The stages that are done, in their order."""
        try:
            found = [Done(**entry) for entry in json.loads(self._path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            return []
        pairs = list(zip(found, self._stages, strict=False))
        counts = (done.command == stage.command and (self._root / stage.leaves).exists() for done, stage in pairs)
        return [done for done, _ in pairs][: sum(itertools.takewhile(bool, counts))]

    def add(self, done: Done) -> None:
        entries = [asdict(entry) for entry in (*self.read(), done)]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._path, json.dumps(entries, indent=1) + "\n")


def run_stages(stages: Sequence[Stage], ledger: Ledger, root: Path) -> int:
    """Run what is not done yet, in `root`, saying each command first; the exit code of the one that failed, or 0."""
    done = {entry.name: entry for entry in ledger.read()}
    for number, stage in enumerate(stages, 1):
        heading = f"\n[{number}/{len(stages)}] {stage.title}"
        if stage.name in done:
            print(f"{heading}: done, in {done[stage.name].seconds:.0f} s", flush=True)
            continue
        print(f"{heading}\n$ {stage.shown}", flush=True)
        began = time.monotonic()
        code, gigabytes = _call(stage, root)
        if code:
            return code
        ledger.add(Done(stage.name, stage.command, time.monotonic() - began, gigabytes))
    return 0


def _call(stage: Stage, root: Path) -> tuple[int, float]:
    """(exit code, GB that the command held at most), in a process between, so that the command's memory is its own."""
    between = (
        "import resource, subprocess, sys\n"
        "code = subprocess.run(sys.argv[2:]).returncode\n"
        "open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))\n"
        "sys.exit(code if code >= 0 else 128 - code)\n"
    )
    note = root / "ckpt" / ".demo-memory"
    note.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", between, str(note), sys.executable, *stage.command.split()]
    # Without something to read, a tool shares this terminal's stdin.
    stdin = f"{stage.typed}\n".encode() if stage.typed else None
    code = subprocess.run(words, cwd=root, input=stdin).returncode
    peak = int(note.read_text()) if note.exists() else 0
    note.unlink(missing_ok=True)
    return code, peak * 1024 / 1e9  # KiB, on Linux
