"""What answers are worth: judged by a reward model or by anybody's function, then clipped, and docked without an end.

    final = clip((raw - mean) / deviation)  - penalty where the answer did not end by itself

raw is a function's number, or a reward model's score, normalised as its directory says; mean and deviation are running
ones over all that was judged so far, where asked for. The penalty comes last, so that no clipping takes it away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from engine.job import JobConfig
from engine.mesh import Runtime
from engine.shard import Precision
from rlhf.judges import Answer, FunctionJudge, Judge, RewardModelJudge, names_function
from rlhf.ppo_config import RewardConfig
from rlhf.prompts import Prompt
from rlhf.reward_model import RewardModel
from rlhf.trajectory import Sample, Trajectory

__all__ = ["Answer", "Scorer", "names_function", "open_scorer"]

# In deviations of a reward model's score.
_CLIP = 5.0


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
