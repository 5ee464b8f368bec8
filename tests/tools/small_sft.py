"""A fine-tuning job of seconds: a folder with a base, conversations and a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.small_base import write_small_base, write_small_conversations
from tests.tools.in_child import Ended, start_tool

RECIPE = """
model: {base}
out: {out}
data: {{paths: [chats.jsonl], workers: 1}}
train: {{steps: 4, micro_batch_tokens: 256, batch_tokens: 1024}}
optim: {{lr: 0.001}}
checkpoint: {{every: 2}}
eval: {{fraction: 0.1}}
log: {{tensorboard: false, curves: false}}
"""


def write_small_sft_job(folder: Path, base: str = "base", out: str = "run") -> Path:
    """A base with a context of 128, `chats.jsonl` and `sft.yaml` in a folder."""
    write_small_base(folder / base, context=128)
    write_small_conversations(folder / "chats.jsonl")
    (folder / "sft.yaml").write_text(RECIPE.format(base=base, out=out))
    return folder


def sft(folder: Path, out: str, *words: object, world: int = 1, before: Callable[[], None] | None = None) -> Ended:
    """The recipe's run in `folder/out`, with these words behind it, run to its good end. Returns the first rank's."""
    command = ("--config", "sft.yaml", "--out", out, *words)
    ends = start_tool("sft", *command, cwd=folder, world=world, before=before).wait()
    assert [ended.code for ended in ends] == [0] * world, ends[0].stderr
    return ends[0]
