"""What users get wrong with reward models: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_sft.py`, where there are also comparisons, and a run that made a reward model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.tools.mistakes import Mistake
from tests.tools.mistakes_sft import sft_new

RM = ("--model", "tuned", "--data", "compared.jsonl", "--data.workers", 1, "--log.tensorboard", False)
RM += ("--log.curves", False, "--train.steps", 2, "--train.micro_batch_tokens", 512, "--train.batch_tokens", 512)


def rm(*words: object, **how: Any) -> Mistake:
    """A run on the comparisons in the folder, with these words behind it."""
    return Mistake("rm", (*RM, *words), **how)


def rm_new(*words: object, **how: Any) -> Mistake:
    """The same, into a fresh directory."""
    return rm("--out", "new", *words, **how)


def judged_by(reward: str, *words: object, **how: Any) -> Mistake:
    """A run of PPO that is to be judged by this reward model."""
    asked = ("--model", "tuned", "--reward", reward, "--data", "chats.jsonl", "--out", "new")
    return Mistake("ppo", (*asked, *words), **how)


def change_config(name: str, **facts: object) -> Any:
    """Set fields of a directory's config.json; then it is like one that another program made."""

    def spoil(folder: Path) -> None:
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
        (folder / name / "MODEL_COMPLETE").unlink(missing_ok=True)
        shutil.rmtree(folder / name / "state", ignore_errors=True)

    return spoil


def forget_the_template(folder: Path) -> None:
    change_config("judge")(folder)
    (folder / "judge" / "chat_template.jinja").unlink()
    path = folder / "judge" / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in facts.items() if name != "chat_template"}))


def read_without_bos(folder: Path) -> None:
    change_config("judge")(folder)
    path = folder / "judge" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": False}))


MISTAKES_RM = {
    "a language model in the place of a reward model": judged_by("tuned"),
    "a reward model with another tokenizer": judged_by("judge", spoil=read_without_bos),
    "a reward model that was trained with another template": judged_by(
        "judge", "--chat.template", "vicuna", "--chat.replace", True
    ),
    "a reward model that stores no template": judged_by("judge", spoil=forget_the_template),
    "a reward model in the place of a language model": sft_new("--model", "judge"),
    "a classifier of several labels": judged_by("judge", spoil=change_config("judge", id2label={"0": "a", "1": "b"})),
    "a language model that calls itself a classifier": judged_by(
        "chat-base", spoil=change_config("chat-base", architectures=["LlamaForSequenceClassification"], num_labels=1)
    ),
    "scores that would be divided by 0": judged_by("judge", spoil=change_config("judge", score_std=0)),
    "no held-out answers to normalise by": rm_new("--eval.fraction", 0),
    "too few held-out answers to normalise by": rm_new("--eval.fraction", 0.001),
    "answers to one prompt that fill more than a micro-batch": rm_new(
        "--train.micro_batch_tokens", 128, "--train.batch_tokens", 128
    ),
    "the checkpoint in --out was trained with another loss": rm("--out", "judge", "--loss.kind", "best"),
}
