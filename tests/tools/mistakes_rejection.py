"""What users get wrong with rejection sampling and DPO: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_rm.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tools.in_child import run_tool
from tests.tools.mistakes import Mistake

QUIET = ("--log.tensorboard", False, "--log.curves", False, "--train.steps", 1, "--train.micro_batch_tokens", 512)
QUIET += ("--train.batch_tokens", 512)
REJECTION = ("--model", "tuned", "--reward", "judge", "--data", "chats.jsonl", "--out", "new", *QUIET)
REJECTION += ("--rollout.prompts", 16, "--rollout.samples", 2, "--rollout.max_new_tokens", 8, "--eval.fraction", 0)
DPO = ("--model", "tuned", "--data", "compared.jsonl", "--data.workers", 1, "--out", "new", *QUIET)


def rejection(*words: object, **how: Any) -> Mistake:
    """A run on prompts of the folder, judged by its reward model, into a fresh directory."""
    return Mistake("rejection", (*REJECTION, *words), **how)


def dpo(*words: object, **how: Any) -> Mistake:
    """A run on the comparisons of the folder, into a fresh directory."""
    return Mistake("dpo", (*DPO, *words), **how)


def after(mistake: Mistake) -> Any:
    """A scene in which this command has been run to its good end."""

    def run(folder: Path) -> None:
        (ended,) = run_tool(mistake.tool, *mistake.words, cwd=folder)
        assert ended.code == 0, ended.stderr

    return run


CUT = ("--select.truncated", True)
MISTAKES_REJECTION: dict[str, Mistake] = {
    "a number of picks that is not whole": rejection("--select.keep", 1.5),
    "a share of picks in percent": rejection("--select.by", "fraction", "--select.keep", 25),
    "no round": rejection("--rounds", 0),
    "samples that are all the same": rejection("--rollout.temperature", 0),
    "answers too short to end": rejection("--rollout.max_new_tokens", 1),
    "the samples in --out were drawn otherwise": rejection(*CUT, "--seed", 1, spoil=after(rejection(*CUT))),
    "no pull to the reference": dpo("--dpo.beta", 0),
    "half of the preferences taken for wrong": dpo("--dpo.label_smoothing", 0.5),
    "label smoothing of an order": dpo("--dpo.loss", "plackett_luce", "--dpo.label_smoothing", 0.1),
    "the checkpoint in --out was trained with another beta": dpo("--dpo.beta", 0.5, spoil=after(dpo())),
}
