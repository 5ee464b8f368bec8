"""What users get wrong with PPO itself: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_rm.py`; what is wrong with prompts, rewards and roles is in
`mistakes_rollout.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tools.in_child import run_tool
from tests.tools.mistakes import Mistake
from tests.tools.mistakes_rm import judged_by
from tests.tools.mistakes_rollout import SMALL


def ppo(*words: object, **how: Any) -> Mistake:
    return judged_by("judge", *SMALL, *words, **how)


def run_two_iterations(folder: Path) -> None:
    (ended,) = run_tool("ppo", *ppo("--train.steps", 2).words, cwd=folder)
    assert ended.code == 0, ended.stderr


MISTAKES_PPO: dict[str, Mistake] = {
    "groups of one answer": ppo("--ppo.advantage", "group"),
    "a sampling filter in training": ppo("--rollout.top_p", 0.9),
    "a sampling temperature of 0": ppo("--rollout.temperature", 0),
    "a divergence in the loss that has no gradient": ppo("--kl.place", "loss", "--kl.estimator", "k1"),
    "an adaptive divergence that weighs nothing": ppo("--kl.coef", 0, "--kl.target", 6),
    "more minibatches than answers": ppo("--ppo.minibatches", 5),
    "a step size where answers decide it": ppo("--train.batch_tokens", 4096),
    "pre-training text without a weight": ppo("--ptx.paths", "data.jsonl"),
    "pre-training text that fills no micro-batch": ppo(
        "--ptx.paths", "data.jsonl", "--ptx.coef", 1, "--ptx.batch_tokens", 1000
    ),
    "no policy to start from": judged_by("judge", "--model", "ckpt/nothing"),
    "the checkpoint in --out learnt by another algorithm": ppo(
        "--ppo.advantage", "rloo", "--rollout.samples", 2, spoil=run_two_iterations
    ),
    "fewer iterations than the checkpoint in --out has": ppo(spoil=run_two_iterations),
}
