"""What an iteration was like: its numbers under the field's names, a table of answers, and when to stop.

`metrics.jsonl` gets a row an iteration, `samples.jsonl` some of its answers. All numbers are of the whole iteration, on
every rank alike, so every rank stops together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.launch import DivergedError
from engine.loggers import drop_rows_after
from rlhf.kl import Estimator, kl_estimate
from rlhf.ppo_config import LimitsConfig
from rlhf.prompts import Prompt
from rlhf.trajectory import Sample, Trajectory

# Below this many standard errors a mean log-ratio is no accident: the sampler is not the policy.
_NEGATIVE_KL = -3.0


def answer_statistics(trajectory: Trajectory, raw: Tensor, kind: Estimator) -> dict[str, float]:
    """What was sampled and how it was judged.

    Args:
        trajectory: with score and old_logprob; reference_logprob where there is a reference.
        raw: fp32 [D], scores before clipping and penalties.
        kind: the estimator of the KL divergence that is used.
    """
    score, actions = trajectory.score, trajectory.actions
    assert score is not None and trajectory.old_logprob is not None
    lengths = trajectory.sum_by_sample(actions.float())
    values = {
        **spread("objective/score", raw),
        **spread("objective/reward", score),
        "objective/entropy": -trajectory.old_logprob[actions].mean(),
        **{f"response/length_{name}": value for name, value in _span(lengths).items()},
        "response/truncated": 1 - trajectory.ended.float().mean(),
    }
    if trajectory.old_logprob is not trajectory.sampled_logprob:
        drift = (trajectory.sampled_logprob - trajectory.old_logprob)[actions].abs()
        values |= {"sampler/logprob_diff_mean": drift.mean(), "sampler/logprob_diff_max": drift.max()}
    _, group, count = trajectory.prompt.unique(return_inverse=True, return_counts=True)
    if len(count) < len(score):
        values["groups/zero_std"] = _share_of_equal_groups(score, group, len(count))
    if trajectory.reference_logprob is not None:
        k1 = trajectory.sum_by_sample(trajectory.old_logprob - trajectory.reference_logprob)
        used = trajectory.sum_by_sample(
            kl_estimate(trajectory.old_logprob, trajectory.reference_logprob, kind) * actions
        )
        values |= {
            "objective/kl": used.mean(),
            "objective/kl_per_token": used.sum() / lengths.sum(),
            "objective/kl_k1": k1.mean(),
            "objective/kl_k1_error": k1.std(correction=0) / math.sqrt(len(k1)),
        }
    return _numbers(values)


def advantage_statistics(trajectory: Trajectory) -> dict[str, float]:
    """What the update will be told. Explained variance: 1 - Var(returns - values) / Var(returns)."""
    values: dict[str, Tensor] = {}
    for name in ("values", "returns", "advantages"):
        field: Tensor | None = getattr(trajectory, name)
        if field is not None:
            values |= {f"{name}/{part}": value for part, value in _span(field[trajectory.actions]).items()}
    if trajectory.values is not None and trajectory.returns is not None:
        returns = trajectory.returns[trajectory.actions]
        error = returns - trajectory.values[trajectory.actions]
        variance = returns.var(correction=0)
        values["value/explained_variance"] = torch.where(variance > 0, 1 - error.var(correction=0) / variance, 0.0)
    return _numbers(values)


def spread(name: str, values: Tensor) -> dict[str, Tensor]:
    """Mean, deviation and range."""
    return {f"{name}_{part}": value for part, value in {**_span(values), "std": values.std(correction=0)}.items()}


def _span(values: Tensor) -> dict[str, Tensor]:
    return {"mean": values.mean(), "min": values.min(), "max": values.max()}


def _share_of_equal_groups(score: Tensor, group: Tensor, count: int) -> Tensor:
    """Share of prompts whose answers all have one score, of which a group learns nothing."""
    ends = (score.new_zeros(count).scatter_reduce(0, group, score, how, include_self=False) for how in ("amin", "amax"))
    return torch.eq(*ends).float().mean()


def _numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """To the host in one copy."""
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist(), strict=True))


def negative_kl(row: dict[str, float]) -> str | None:
    """A warning when the mean log-ratio to the reference is negative beyond chance: KL cannot be."""
    mean, error = row.get("objective/kl_k1", 0.0), row.get("objective/kl_k1_error", 0.0)
    if not (error > 0 and mean < _NEGATIVE_KL * error):
        return None
    return (
        f"The KL divergence is measured as {mean:.3f}, {-mean / error:.1f} standard errors below 0, where it cannot "
        "be: answers are not drawn from the policy that is trained. Look at sampler/logprob_diff_max."
    )


@dataclass(frozen=True)
class _Limit:
    """One way to go wrong. `found` and `remedy` are a user's words."""

    option: str
    number: str
    is_upper: bool
    found: str
    remedy: str

    def is_crossed(self, value: float, bound: float) -> bool:
        return not (value <= bound if self.is_upper else value >= bound)  # nan is beyond every limit


_LIMITS = (
    _Limit("kl", "objective/kl", True, "the policy is {} nats an answer from the reference", "Raise --kl.coef or "
           "lower --optim.lr"),
    _Limit("entropy", "objective/entropy", False, "its entropy is {} nats a token, so that it always says the same",
           "Raise --ppo.entropy or --kl.coef, or lower --optim.lr"),
    _Limit("truncated", "response/truncated", True, "{} of its answers did not end", "Raise --rollout.max_new_tokens "
           "or --reward.missing_end_penalty"),
    _Limit("length", "response/length_mean", True, "its answers have {} tokens", "Look in samples.jsonl whether the "
           "reward pays for length, and raise --kl.coef"),
    _Limit("reward_std", "objective/score_std", False, "the deviation of the scores is {}", "Look in samples.jsonl "
           "whether the reward tells answers apart"),
)  # fmt: skip


class Limits:
    """Counts the iterations in a row that were beyond each limit; `counts` is state that a checkpoint holds."""

    def __init__(self, config: LimitsConfig, counts: dict[str, int] | None = None) -> None:
        self._config = config
        self.counts = counts or {}

    def look(self, iteration: int, row: dict[str, float]) -> None:
        """Take in an iteration.

        Raises:
            DivergedError: a limit has been crossed `patience` times in a row.
        """
        for limit in _LIMITS:
            bound, value = getattr(self._config, limit.option), row.get(limit.number)
            if bound is None or value is None:
                continue
            count = self.counts.get(limit.option, 0) + 1 if limit.is_crossed(value, bound) else 0
            self.counts[limit.option] = count
            if count >= self._config.patience:
                raise DivergedError(
                    f"Stopped at iteration {iteration}: {limit.found.format(f'{value:.3g}')}; --limits.{limit.option} "
                    f"is {bound:g}, and this was iteration {count} in a row beyond it. {limit.remedy}; or move the "
                    "limit. The last checkpoint is intact."
                )


class SampleTable:
    """`samples.jsonl`: a row an answer, some of them for each iteration; only rank 0 writes.

    Args:
        path: later rows than `steps_done`, of a run that was killed, are dropped.
        most: rows of an iteration.
    """

    def __init__(self, path: Path, steps_done: int, most: int, is_main: bool) -> None:
        self._path, self._most, self._is_main = path, most, is_main
        if is_main:
            drop_rows_after(path, steps_done, lambda row: not row["held_out"])

    def write(
        self,
        step: int,
        prompts: Sequence[Prompt],
        samples: Sequence[Sample],
        trajectory: Trajectory,
        raw: Tensor,
        is_held_out: bool = False,
    ) -> None:
        """Rows evenly spread over the iteration's answers."""
        if not self._is_main or not self._most:
            return
        messages = {prompt.position: [vars(message) for message in prompt.messages] for prompt in prompts}
        kl: list[float] | None = None
        if trajectory.reference_logprob is not None and trajectory.old_logprob is not None:
            kl = trajectory.sum_by_sample(trajectory.old_logprob - trajectory.reference_logprob).tolist()
        assert trajectory.score is not None
        scores, rewards = raw.tolist(), trajectory.score.tolist()
        stride = max(1, -(-len(samples) // self._most))
        with self._path.open("a", encoding="utf-8") as file:
            for index in range(0, len(samples), stride):
                sample = samples[index]
                row = {
                    "step": step,
                    "held_out": is_held_out,
                    "prompt": messages[sample.prompt],
                    "answer": sample.text,
                    "score": scores[index],
                    "reward": rewards[index],
                    "kl": kl[index] if kl else None,
                    "tokens": len(sample.answer_ids),
                    "end": sample.end_reason,
                    "position": sample.prompt,
                    "sample": sample.sample,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
