"""What answers are worth: judged by a reward model or by anybody's function, then clipped, and docked without an end.

    final = clip((raw - mean) / deviation)  - penalty where the answer did not end by itself

raw is a function's number, or a reward model's score, normalised as its directory says; mean and deviation are running
ones over all that was judged so far, where asked for. The penalty comes last, so that no clipping takes it away.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.agreement import ControlGroup
from engine.building import Base
from engine.job import JobConfig
from engine.mesh import Runtime
from engine.shard import Precision
from model.chat import Message
from model.errors import InputError
from rlhf.micro_batches import each_token, micro_batches
from rlhf.ppo_config import RewardConfig
from rlhf.prompts import Prompt
from rlhf.reward_model import RewardModel
from rlhf.roles import Frozen, NormalisedScore
from rlhf.trajectory import Sample, Trajectory

# In deviations of a reward model's score.
_CLIP = 5.0


class Answer(NamedTuple):
    """What a reward function is given of a sample.

    messages: the conversation up to the question.
    text: the answer, without what ended it.
    is_complete: whether it ended by itself.
    fields: of the record that the prompt is from, such as a known answer.
    """

    messages: tuple[Message, ...]
    text: str
    is_complete: bool
    fields: dict[str, Any]


class Judge(Protocol):
    """Gives each sample a number: fp32 [D], the same on every rank. Every rank calls it."""

    def __call__(
        self, prompts: Sequence[Prompt], samples: Sequence[Sample], trajectory: Trajectory, runtime: Runtime
    ) -> Tensor: ...


class RewardModelJudge:
    """A reward model's normalised scores, read at the last token of each sample.

    Args:
        context: the longest prompt with its answer.
        capacity: tokens of a forward pass.
    Raises:
        InputError: the model does not reach the context.
    """

    def __init__(
        self,
        reward: RewardModel,
        context: int,
        capacity: int,
        job: JobConfig,
        precision: Precision,
        runtime: Runtime,
        offload: bool = False,
    ) -> None:
        config, base = reward.config.with_context(context), Base(reward.config, reward.directory)
        offload = offload and runtime.device.type == "cuda"
        self.role, self._capacity = Frozen(NormalisedScore, config, base, job, precision, runtime, offload), capacity

    def __call__(
        self, prompts: Sequence[Prompt], samples: Sequence[Sample], trajectory: Trajectory, runtime: Runtime
    ) -> Tensor:
        everybody = np.arange(trajectory.num_samples)
        slices = micro_batches(trajectory, everybody, self._capacity, runtime.rank, runtime.world)
        with self.role.at_work() as model:
            return each_token(trajectory, slices, model, runtime)[trajectory.last_token]


class FunctionJudge:
    """Somebody's function, called on rank 0 with all answers, so that what it gives depends on no number of ranks.

    Args:
        source: "module:function"; the module is looked for where the command runs, too.
    Raises:
        InputError: there is no such function.
    """

    def __init__(self, source: str) -> None:
        self._source, self._ranks = source, ControlGroup()
        self._function: Callable[[list[Answer]], Any] | None = None
        self._ranks.first(f"import {source}", self._import)

    def __call__(
        self, prompts: Sequence[Prompt], samples: Sequence[Sample], trajectory: Trajectory, runtime: Runtime
    ) -> Tensor:
        scores = self._ranks.first(f"score with {self._source}", lambda: self._score(prompts, samples))
        return torch.tensor(scores, dtype=torch.float32, device=runtime.device)

    def _import(self) -> None:
        module, _, name = self._source.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            function = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # of a module that theirs imports
            raise InputError(
                f"--reward {self._source}: there is no module {error.name} here. Start the command in the folder that "
                "holds it, or install it."
            ) from None
        if not callable(function):
            raise InputError(f"--reward {self._source}: {module} has no function {name!r}. Check its name.")
        self._function = function

    def _score(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[float]:
        asked = {prompt.position: prompt for prompt in prompts}
        answers = [
            Answer(asked[sample.prompt].messages, sample.text, sample.end_reason == "stop", asked[sample.prompt].fields)
            for sample in samples
        ]
        assert self._function is not None
        try:
            given = self._function(answers)
        except Exception as error:
            # Whatever it is: of an OSError or InputError nobody would see where it was raised.
            raise RuntimeError(f"the reward function {self._source} failed") from error
        return self._checked(given, len(answers))

    def _checked(self, given: Any, count: int) -> list[float]:
        what = f"The reward function {self._source} returned"
        advice = f"It is given a list of {count} answers and returns a list of as many numbers."
        if hasattr(given, "tolist"):  # of torch or NumPy
            given = given.tolist()
        if not isinstance(given, (list, tuple)):
            raise InputError(f"{what} {type(given).__name__}. {advice}")
        if len(given) != count:
            raise InputError(f"{what} {len(given)} numbers. {advice}")
        for number, value in enumerate(given):
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if not isinstance(value, Real) or not math.isfinite(value):
                raise InputError(f"{what} {value!r} for answer {number}. {advice}")
        return [float(value) for value in given]


class Scorer:
    """A judge, and what becomes of its numbers.

    Args:
        clip: largest final score either way, before the penalty; 0 for none.
        missing_end_penalty: taken off the score of an answer that did not end by itself; 0 leaves it as it is.
        normalise: whether running mean and deviation are applied.
    """

    def __init__(self, judge: Judge, clip: float = 0.0, missing_end_penalty: float = 0.0, normalise: bool = False):
        self._judge, self._clip, self._penalty, self._normalise = judge, clip, missing_end_penalty, normalise
        self._count, self._mean, self._squares = (
            0,
            0.0,
            0.0,
        )  # of raw scores; squares are those of distances to the mean

    def score(
        self, prompts: Sequence[Prompt], samples: Sequence[Sample], trajectory: Trajectory, runtime: Runtime
    ) -> tuple[Tensor, Tensor]:
        """Scores as they were given, and as they are learnt from: fp32 [D] each, the same on every rank.

        Args:
            trajectory: of the samples.
        Raises:
            InputError: a function returned something else than finite numbers, one an answer.
        """
        raw = self._judge(prompts, samples, trajectory, runtime)
        final = raw
        if self._normalise:
            self._follow(raw.double())
            deviation = math.sqrt(self._squares / self._count)
            final = (raw - self._mean) / (deviation if deviation > 0 else 1.0)
        if self._clip:
            final = final.clamp(-self._clip, self._clip)
        return raw, final - self._penalty * (~trajectory.ended).float()

    def state(self) -> dict[str, float]:
        """Fit for JSON."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a `state`."""
        self._count, self._mean, self._squares = int(state["count"]), state["mean"], state["squares"]

    def _follow(self, raw: Tensor) -> None:
        """Chan, Golub & LeVeque 1983, eq. 2.1: two sets' means and sums of squares to those of both."""
        count, mean = len(raw), raw.mean().item()
        distance, total = mean - self._mean, self._count + count
        self._squares += (raw - mean).square().sum().item() + distance**2 * self._count * count / total
        self._mean += distance * count / total
        self._count = total


def open_scorer(
    config: RewardConfig,
    reward: RewardModel | None,
    context: int,
    capacity: int,
    job: JobConfig,
    precision: Precision,
    runtime: Runtime,
) -> Scorer:
    """The scorer that the options describe. A collective.

    Args:
        reward: what `open_reward_model(config.source, ...)` gives where `names_function` says no; else None.
        context, capacity: see `RewardModelJudge`.
    """
    judge: Judge
    if reward is None:
        judge = FunctionJudge(config.source)
    else:
        judge = RewardModelJudge(reward, context, capacity, job, precision, runtime, config.offload)
    clip = config.clip
    if clip is None:
        clip = 0.0 if reward is None else _CLIP
    return Scorer(judge, clip, config.missing_end_penalty, config.normalise)


def names_function(source: str) -> bool:
    """Whether `--reward` names a function and no directory.

    Raises:
        InputError: it names neither.
    """
    if Path(source).is_dir():
        return False
    module, separator, name = source.partition(":")
    if separator and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return True
    raise InputError(
        f"--reward {source}: neither a directory nor a function. Train a reward model with tools/rm.py, or name a "
        "function as module:function."
    )
