"""An alignment job of seconds: a folder with a policy, a reward model, a reward function and prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.rlhf.small_reward import write_small_reward_model, write_small_sft
from tests.small_base import write_small_conversations
from tests.tools.in_child import Ended, Running, start_tool

RECIPE = """
model: sft
out: run
reward: {source: rm}
data: {paths: [chats.jsonl]}
train: {steps: 4, micro_batch_tokens: 256}
rollout: {prompts: 8, max_new_tokens: 8}
optim: {lr: 0.001}
value: {lr: 0.001}
checkpoint: {every: 2}
eval: {every: 2, fraction: 0.1}
limits: {truncated: null}
log: {tensorboard: false, curves: false}
"""
RULES = """
def brief(answers):
    return [-float(len(answer.text)) for answer in answers]
"""


def write_small_ppo_job(folder: Path) -> Path:
    """`sft`, `rm`, `rules.py`, `chats.jsonl` and `ppo.yaml` in a folder."""
    write_small_sft(folder / "sft")
    write_small_reward_model(folder / "rm", mean=0.1, std=0.5)
    write_small_conversations(folder / "chats.jsonl", 40)
    (folder / "rules.py").write_text(RULES)
    (folder / "ppo.yaml").write_text(RECIPE)
    return folder


def start_ppo(
    folder: Path, out: str, *words: object, world: int = 1, before: Callable[[], None] | None = None
) -> Running:
    """The recipe's run in `folder/out`, with these words behind it."""
    return start_tool("ppo", "--config", "ppo.yaml", "--out", out, *words, cwd=folder, world=world, before=before)


def run_ppo(folder: Path, out: str, *words: object, world: int = 1) -> Ended:
    """The same, run to its good end. Returns the first rank's."""
    ends = start_ppo(folder, out, *words, world=world).wait()
    assert [ended.code for ended in ends] == [0] * world, ends[0].stderr
    return ends[0]
