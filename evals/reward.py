"""Reward: what a reward model thinks of a model's answers, and how often it prefers them to another's.

Answers are responses like any other and kept; rewards are computed from them whenever the result is, by the judge that
the settings name, so a run that resumes asks nothing twice. A reward says nothing by itself: it compares models under
one judge. Judges like length, so answers' lengths stand beside, and `win_rate` looks at pairs of equal length apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from engine.chatting import SamplingConfig
from engine.data.conversations import KEYS
from engine.data.sources import list_files
from engine.files import digest_files
from engine.intervals import Share, clustered_difference, clustered_share, wilson_interval
from engine.prompts import read_prompts
from evals.comparison import bootstrap_interval
from evals.generation import PLAIN as WORDINGS
from evals.suite import BuildContext, Builder, Judge, TaskSpec
from evals.task import Answer, Answered, Item, Metric, Prompt, Request, Response, Result, Task
from model.chat import Message
from model.errors import InputError

TIE = 0.01
"""Rewards that differ by no more are alike: a reward model's are in deviations of its scores of people's answers, and
in bfloat16 two computations of one score differ by so much."""
NEAR = 0.1
"""Answers are of nearly equal length where the shorter one lacks no more than this share of the longer one."""

PLAIN = WORDINGS["qa"]


class Asked(NamedTuple):
    """A prompt of the file. id: number of the record, from 1."""

    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class RewardTask:
    """prompts: all, or those drawn of them. refused: records that held no prompt."""

    name: str
    prompts: tuple[Asked, ...]
    refused: int
    fingerprint: str
    judge: Judge
    sampling: SamplingConfig
    system: str
    prompting: Literal["chat", "plain"]
    seed: int
    kind: Literal["reward"] = "reward"

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        sampling = {name: value for name, value in dataclasses.asdict(self.sampling).items() if name != "stop"}
        return {
            "file": self.fingerprint,
            "prompts": len(self.prompts),
            "reward_model": str(getattr(self.judge, "fingerprint", "")),
            "template": "" if self.prompting == "chat" else f"{PLAIN.user}{{question}}\n{PLAIN.assistant}",
            "system": self.system,
            "prompting": self.prompting,
            **sampling,
            "seed": self.seed,
            "signature": f"reward|prompting:{self.prompting}|tie:{TIE}|near:{NEAR}|version:1",
        }

    def requests(self) -> Sequence[Request]:
        return [Answer(asked.id, self._prompt(asked), self.sampling, self.seed) for asked in self.prompts]

    def result(self, responses: Mapping[str, Response]) -> Result:
        answers = [_answered(responses[asked.id]) for asked in self.prompts]
        pairs = [(self._messages(asked), answer.text) for asked, answer in zip(self.prompts, answers, strict=True)]
        rewards = self.judge(pairs)
        items = tuple(
            _item(asked, self._prompt(asked), answer, reward)
            for asked, answer, reward in zip(self.prompts, answers, rewards, strict=True)
        )
        n, ended = len(items), sum(answer.end_reason == "stop" for answer in answers)
        length = sum(answer.tokens for answer in answers) / n
        metrics = (
            Metric("reward", sum(rewards) / n, *bootstrap_interval(items, "reward", self.seed), n, "score"),
            Metric("tokens", length, *bootstrap_interval(items, "tokens", self.seed), n, "tokens", None),
            Metric("end_rate", ended / n, *wilson_interval(ended / n, n), n),
        )
        counts = {
            "refused_records": self.refused,
            "empty_answers": sum(not answer.text.strip() for answer in answers),
        }
        notes = ("Rewards compare models under one reward model, and are no measure of what is true or safe.",)
        return Result(metrics, items, counts={name: count for name, count in counts.items() if count}, notes=notes)

    def _messages(self, asked: Asked) -> tuple[Message, ...]:
        if not self.system or asked.messages[0].role == "system":
            return asked.messages
        return (Message("system", self.system), *asked.messages)

    def _prompt(self, asked: Asked) -> Prompt:
        messages = self._messages(asked)
        if self.prompting == "chat":
            return messages
        lines = {"system": "{}\n", "user": PLAIN.user + "{}", "assistant": PLAIN.assistant + "{}"}
        return "\n".join([lines[message.role].format(message.content) for message in messages] + [PLAIN.assistant])


def _answered(response: Response) -> Answered:
    assert isinstance(response, Answered)
    return response


def _item(asked: Asked, prompt: Prompt, answer: Answered, reward: float) -> Item:
    parts = {
        "reward": (reward, 1.0),
        "tokens": (float(answer.tokens), 1.0),
        "end_rate": (float(answer.end_reason == "stop"), 1.0),
    }
    shown = prompt if isinstance(prompt, str) else "\n\n".join(message.content for message in prompt)
    return Item(asked.id, parts, shown, answer.text, "", texts=(asked.messages[-1].content,))


@dataclass(frozen=True)
class WinRate:
    """Answers of one model against another's to the same prompts, under one reward model.

    rate: wins and half of the ties, of all pairs; Wilson's interval at the number of prompts that are as sure as these.
    wins, ties, losses: of the first model.
    unpaired: prompts that only one of the two has answered.
    longer: by how many tokens the first model's answers exceed the other's, in the mean.
    rate_near, near: the same rate over pairs of nearly equal length, and how many they are.
    """

    rate: Share
    wins: int
    ties: int
    losses: int
    unpaired: int
    longer: Share
    rate_near: Share
    near: int


def win_rate(a: Result, b: Result, tie: float = TIE, near: float = NEAR) -> WinRate:
    """How often `a` is preferred to `b`: two results of the same reward task, paired by id.

    Args:
        tie: rewards that differ by no more are alike, as are answers that say the same.
        near: answers are of nearly equal length where the shorter one lacks no more than this share of the longer one.
    """
    of_a, of_b = ({item.id: item for item in result.items} for result in (a, b))
    shared = sorted(of_a.keys() & of_b.keys())
    rewards, lengths = (
        np.array([[of[id].parts[name][0] for of in (of_a, of_b)] for id in shared], np.float64).reshape(-1, 2)
        for name in ("reward", "tokens")
    )
    is_same = np.array([of_a[id].answer == of_b[id].answer for id in shared], bool)
    margin = rewards[:, 0] - rewards[:, 1]
    is_tie = is_same | (np.abs(margin) <= tie)
    won = np.where(is_tie, 0.5, margin > 0)
    is_near = lengths.max(1, initial=0) - lengths.min(1, initial=np.inf) <= near * lengths.max(1, initial=0)
    places: dict[str, int] = {}  # a prompt that the file holds twice is one
    prompts = np.array([places.setdefault(of_a[id].shown, len(places)) for id in shared], np.int64)
    return WinRate(
        clustered_share(won, prompts),
        int((won == 1).sum()),
        int(is_tie.sum()),
        int((won == 0).sum()),
        len(of_a.keys() ^ of_b.keys()),
        clustered_difference(lengths[:, 0] - lengths[:, 1], prompts),
        clustered_share(won[is_near], prompts[is_near]),
        int(is_near.sum()),
    )


def build(spec: TaskSpec, context: BuildContext) -> Task:
    """Raises InputError: no reward model, or a file without prompts."""
    path = spec.require_path("a file of prompts, such as tools/sft.py reads")
    if context.judge is None:
        raise InputError(f"--tasks {spec.name}: there is nobody to judge. Name a reward model with --reward DIR.")
    prompts, refused = _read(spec, path)
    sampling = SamplingConfig(
        temperature=spec.take_float("temperature", 0.0),
        top_p=spec.take_float("top_p", 1.0),
        top_k=spec.take_int("top_k", 0),
        repetition_penalty=spec.take_float("repetition_penalty", 1.0),
        max_new_tokens=spec.take_int("max_new_tokens", SamplingConfig.max_new_tokens, low=1),
        stop=[f"\n{PLAIN.user}"] if context.prompting == "plain" else [],
    )
    sampling.options(())  # see that it can be
    return RewardTask(
        spec.take_str("label", spec.name),
        tuple(context.draw(prompts)),
        refused,
        digest_files(*(Path(file.path) for file in list_files([path]).files)),
        context.judge,
        sampling,
        spec.take_str("system", ""),
        context.prompting,
        context.seed,
    )


def _read(spec: TaskSpec, path: Path) -> tuple[list[Asked], int]:
    """The prompts of a file, and how many records held none."""
    keys = {key: names for key in KEYS if key != "system" and (names := spec.take_str(key))}
    prompts, refused = [], 0
    try:
        for number, record in enumerate(read_prompts(path, keys), 1):
            refused += not record.messages
            if record.messages:
                prompts.append(Asked(str(number), tuple(record.messages)))
    except InputError as error:
        # How fields are named in a word of --tasks.
        raise InputError(str(error).replace("--data.keys user=FIELD (docs/chatting.md)", "user=FIELD")) from None
    if not prompts:
        raise InputError(f"{path}: there is no prompt in it. Give another file.")
    return prompts, refused


BUILDERS: dict[str, Builder] = {"reward": build}
