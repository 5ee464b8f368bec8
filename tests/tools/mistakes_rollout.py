"""What users get wrong with prompts, rewards and roles: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_rm.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tools.in_child import run_tool
from tests.tools.mistakes import Mistake
from tests.tools.mistakes_rm import judged_by

SMALL = ("--rollout.prompts", 4, "--rollout.max_new_tokens", 4, "--train.steps", 1, "--eval.fraction", 0)
SMALL += ("--log.tensorboard", False, "--log.curves", False)
RULES = "def words(answers):\n    return ['good'] * len(answers)\n"


def by_rules(name: str) -> Mistake:
    """A run that is to be judged by a function of the folder."""
    return judged_by(f"rules:{name}", *SMALL, spoil={"rules.py": RULES})


def add_no_bos(folder: Path) -> None:
    path = folder / "wide" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": False}))


def change_the_prompts(folder: Path) -> None:
    """After an iteration on all of them."""
    (ended,) = run_tool("ppo", *judged_by("judge", *SMALL).words, cwd=folder)
    assert ended.code == 0, ended.stderr
    lines = (folder / "chats.jsonl").read_text().splitlines()
    (folder / "chats.jsonl").write_text("\n".join(lines[10:]))


def judged(*words: object, **how: Any) -> Mistake:
    return judged_by("judge", *words, **how)


MISTAKES_ROLLOUT: dict[str, Mistake] = {
    "a reward that does not exist": judged_by("nothing"),
    "a reward function in a module that is not found": judged_by("rules:score", *SMALL),
    "a reward function that its module does not have": by_rules("score"),
    "a reward function that returns something else than numbers": by_rules("words"),
    "answers as long as the context": judged("--rollout.max_new_tokens", 128),
    "answers that leave no room for any question": judged("--rollout.max_new_tokens", 127),
    "all prompts are held out": judged("--eval.data", "chats.jsonl", "--rollout.max_new_tokens", 4),
    "--out is the reward model": judged("--out", "judge", *SMALL),
    "a reference with another tokenizer": judged("--kl.reference", "wide", *SMALL, spoil=add_no_bos),
    "a critic with another tokenizer": judged("--value.model", "wide", *SMALL, spoil=add_no_bos),
    "other prompts when a run goes on": judged(*SMALL, "--train.steps", 2, spoil=change_the_prompts),
}
