"""Who says what an answer is worth: a reward model, or anybody's function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine import user_code
from engine.agreement import ControlGroup
from engine.building import Base
from engine.job import JobConfig
from engine.mesh import Runtime
from engine.shard import Precision
from engine.user_code import load_function
from model.chat import Message
from model.errors import InputError
from rlhf.micro_batches import each_token, micro_batches
from rlhf.prompts import Prompt
from rlhf.reward_model import RewardModel
from rlhf.roles import Frozen, NormalisedScore
from rlhf.trajectory import Sample, Trajectory


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
        self._function = load_function(self._source, "--reward")

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


def names_function(source: str) -> bool:
    """Whether `--reward` names a function and no directory.

    Raises:
        InputError: it names neither.
    """
    if Path(source).is_dir():
        return False
    if user_code.names_function(source):
        return True
    raise InputError(
        f"--reward {source}: neither a directory nor a function. Train a reward model with tools/rm.py, or name a "
        "function as module:function."
    )
