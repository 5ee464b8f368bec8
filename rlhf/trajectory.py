"""What passes between the stages of alignment: answers as they were sampled, and all that is known of them.

One alignment everywhere: every [T] field follows targets, so at t it speaks of tokens[t + 1], the action taken in the
state that tokens[.. t] are. A prompt of P tokens with an answer of A lies end to end as P + A tokens; its actions are
at P - 1 up to P + A - 2, the last of them the end token where one was sampled. Masks come from these lengths, never
from token ids, and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from model.batch import IGNORE


@dataclass(frozen=True)
class Sample:
    """An answer as the sampler drew it, on the host: what ranks exchange and what is kept.

    prompt: the prompt's position in the stream; sample: number of the answer among those to it.
    prompt_ids, answer_ids: at least one each. The answer holds the token that ended it, if one did, and no other that
        was not sampled.
    logprobs: of answer_ids, as the sampler computed them.
    end_reason: "stop" at a token or text that ends answers, "length" where the answer was cut.
    seed: of the sampler; version: updates that the policy had behind it.
    text: the answer without what ended it.
    """

    prompt: int
    sample: int
    prompt_ids: list[int]
    answer_ids: list[int]
    logprobs: list[float]
    end_reason: Literal["stop", "length"]
    seed: int
    version: int
    text: str


@dataclass(frozen=True)
class Trajectory:
    """D samples of T tokens in all, the same on every rank; each stage returns it with a field more.

    tokens:          int64 [T]
    cu_seqlens:      int32 [D + 1]
    prompt_lengths:  int64 [D]
    actions:         bool [T], whether tokens[t + 1] was sampled
    sampled_logprob: fp32 [T], by the sampler
    prompt, sample:  int64 [D], which answer to which prompt
    ended:           bool [D], whether the answer ended by itself

    score:             fp32 [D]
    old_logprob:       fp32 [T], of the policy before the update, what ratios are taken to
    reference_logprob: fp32 [T]
    values:            fp32 [T], V of the state tokens[.. t], at every token: at a sample's last one it is what a cut
                       answer was still worth
    rewards, advantages, returns: fp32 [T]

    Log-probabilities are those of softmax(logits / temperature) over the whole vocabulary. Every [T] field but tokens
    and values is 0 where there is no action.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    prompt_lengths: Tensor
    actions: Tensor
    sampled_logprob: Tensor
    prompt: Tensor
    sample: Tensor
    ended: Tensor
    score: Tensor | None = None
    old_logprob: Tensor | None = None
    reference_logprob: Tensor | None = None
    values: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device | str) -> Trajectory:
        """The samples end to end, in their order; ids are taken as they were sampled."""
        prompts = np.array([len(sample.prompt_ids) for sample in samples])
        answers = np.array([len(sample.answer_ids) for sample in samples])
        assert prompts.min() > 0 and answers.min() > 0
        ends = np.cumsum(prompts + answers)
        # Step of +1 at the first action, of -1 behind the last one.
        steps = np.zeros(ends[-1], np.int8)
        steps[ends - answers - 1] = 1
        steps[ends - 1] -= 1
        actions = np.cumsum(steps, dtype=np.int8).astype(bool)
        logprob = np.zeros(ends[-1], np.float32)
        logprob[actions] = np.concatenate([sample.logprobs for sample in samples])

        def tensor(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype, device=device)

        return cls(
            tokens=tensor(np.concatenate([ids for one in samples for ids in (one.prompt_ids, one.answer_ids)])),
            cu_seqlens=tensor(np.append(0, ends), torch.int32),
            prompt_lengths=tensor(prompts),
            actions=tensor(actions, torch.bool),
            sampled_logprob=tensor(logprob, torch.float32),
            prompt=tensor([sample.prompt for sample in samples]),
            sample=tensor([sample.sample for sample in samples]),
            ended=tensor([sample.end_reason == "stop" for sample in samples], torch.bool),
        )

    def replace(self, **fields: Tensor) -> Trajectory:
        """The same samples with more known of them."""
        return replace(self, **fields)

    @property
    def num_samples(self) -> int:
        return len(self.prompt)

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 [D + 1], `cu_seqlens` on the host."""
        return self.cu_seqlens.cpu().numpy().astype(np.int64)

    @cached_property
    def on_host(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, int64 [T] each: what follows where that is an action, else IGNORE."""
        tokens, actions = self.tokens.cpu().numpy(), self.actions.cpu().numpy()
        return tokens, np.where(actions, np.roll(tokens, -1), IGNORE)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [D], tokens of each sample with its prompt, on the host."""
        return np.diff(self.bounds)

    @property
    def last_token(self) -> Tensor:
        """int64 [D]"""
        return self.cu_seqlens[1:].long() - 1

    @property
    def last_action(self) -> Tensor:
        """int64 [D]: where the last sampled token, the end token if there is one, is the target."""
        return self.last_token - 1

    def sum_by_sample(self, values: Tensor) -> Tensor:
        """[D], sums of [T] over each sample; in one order, so always the same."""
        return torch.segment_reduce(values, "sum", offsets=self.cu_seqlens.long(), axis=0)

    def by_token(self, values: Tensor) -> Tensor:
        """[T], each sample's number of [D] at all of its actions, 0 elsewhere."""
        spread = values.repeat_interleave(self.cu_seqlens.diff().long(), output_size=len(self.tokens))
        return spread.where(self.actions, 0)
