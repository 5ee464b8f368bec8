"""Answers of the policy: its weights gathered once, each rank generating its share, everything then known to all.

A sample's draws are a function of (run seed, the prompt's position, the sample's number), so they depend neither on the
number of ranks nor on what else is generated, and resuming needs no state of a random generator. Nothing is filtered
and nothing penalised: a token's probability is that of softmax(logits / temperature), which is what is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine.mesh import Runtime
from engine.publish import gather_full
from model.config import ModelConfig
from model.errors import InputError
from model.generate import Completion, Generator, Request
from model.kv_cache import page_bytes, pages_for
from model.lora import LoraSpec, merged
from model.sampling import SamplingOptions, row_seed
from model.tokenizer import Tokenizer
from rlhf.prompts import Prompt
from rlhf.trajectory import Sample


class Rollout:
    """Owns the generator.

    Args:
        config: of the policy.
        stop_ids: tokens that end an answer, as `ChatTemplate.end_ids` names them.
        seed: of the run.
        dtype: of the generator's weights and cache: what the policy computes in.
        context: the longest prompt with its answer.
        rows, cache_bytes: see `Generator`.
        keep: hold weights, cache and graphs between rollouts, instead of freeing them.
        lora: of the policy's adapters, which the generator takes over merged.

    Attributes:
        seconds: of the last rollout, by part: weights, generation, exchange.
    Raises:
        InputError: the cache would not hold one prompt with its answer.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        *,
        seed: int,
        dtype: torch.dtype,
        context: int,
        rows: int = 64,
        cache_bytes: int | None = None,
        keep: bool = False,
        lora: LoraSpec | None = None,
    ) -> None:
        needed = (1 + pages_for(context)) * page_bytes(config, dtype)
        if cache_bytes is not None and cache_bytes < needed:
            raise InputError(
                f"--rollout.cache_gib {cache_bytes / 2**30:g} does not hold an answer with its prompt, {context} "
                f"tokens. Use at least {math.ceil(1000 * needed / 2**30) / 1000:g}, or lower --train.context."
            )
        self.seconds: dict[str, float] = {}
        self.generator: Generator | None = None
        self._config, self._tokenizer, self._stop_ids = config, tokenizer, tuple(stop_ids)
        self._seed, self._dtype, self._context, self._keep = seed, dtype, context, keep
        self._rows, self._cache_bytes, self._lora = rows, cache_bytes, lora
        self._version: int | None = None  # of the weights that the generator holds

    def collect(
        self,
        policy: nn.Module,
        prompts: Sequence[Prompt],
        samples: int,
        temperature: float,
        max_new_tokens: int,
        version: int,
        runtime: Runtime,
        seed: int | None = None,
        beat: Callable[[], None] | None = None,
    ) -> list[Sample]:
        """Answers to all prompts, of all ranks, in the order of (prompt, sample): the same list on every rank.

        Each rank generates a run of them, as many as the others to one, so a prompt's samples may be divided.

        Args:
            policy: a `CausalLM`, sharded in any way.
            samples: answers to each prompt.
            version: updates of the policy; weights that are kept serve as long as it stays the same.
            seed: instead of the run's, such as for held-out prompts, whose positions are those of others.
            beat: see `Generator.generate`.
        Raises:
            InputError: the memory does not hold one sequence of the context, or a prompt leaves no room in it.
        """
        seed = self._seed if seed is None else seed
        options = SamplingOptions(temperature=temperature, max_new_tokens=max_new_tokens, stop_ids=self._stop_ids)
        count = len(prompts) * samples
        first, last = (rank * count // runtime.world for rank in (runtime.rank, runtime.rank + 1))
        with self._timed("weights"):
            generator = self._load(policy, version, runtime)
        with self._timed("generation"):
            completions = generator.generate(
                [
                    Request(prompts[at].ids, options, end - begin, row_seed(seed, prompts[at].position), begin)
                    for at, begin, end in _runs(first, last, samples)
                ],
                beat,
            )
            answers = [self._answer(completion) for completion in completions]
        if not self._keep:
            self.release()
        with self._timed("exchange"):
            answers = _exchange(answers, first, count, runtime)
        found = []
        for number, answer in enumerate(answers):
            prompt, sample = prompts[number // samples], number % samples
            found.append(
                Sample(
                    prompt=prompt.position,
                    sample=sample,
                    prompt_ids=prompt.ids,
                    answer_ids=answer.ids.tolist(),
                    logprobs=answer.logprobs.tolist(),
                    end_reason="stop" if answer.is_stopped else "length",
                    seed=row_seed(row_seed(seed, prompt.position), sample),
                    version=version,
                    text=answer.text.tobytes().decode(),
                )
            )
        return found

    def release(self) -> None:
        """Free the generator's memory until the next rollout."""
        if self.generator is not None:
            self.generator.release()
        self._version = None

    def _load(self, policy: nn.Module, version: int, runtime: Runtime) -> Generator:
        if self.generator is None:
            self.generator = Generator(
                self._config,
                device=runtime.device,
                dtype=self._dtype,
                cache_bytes=self._cache_bytes,
                max_rows=self._rows,
                context=self._context,
            )
        if self._version != version:
            tensors: Iterator[tuple[str, Tensor]] = gather_full(policy.named_parameters(), self._dtype, everywhere=True)
            self.generator.load(tensors if self._lora is None else merged(tensors, self._config, self._lora))
            self._version = version
        return self.generator

    def _answer(self, completion: Completion) -> _Answer:
        is_stopped = completion.end_reason == "stop"
        ids = completion.ids[:-1] if is_stopped else completion.ids
        text = self._tokenizer.decode(ids, skip_special=True).encode()
        return _Answer(
            np.array(completion.ids, np.int32),
            np.array(completion.logprobs, np.float32),
            np.frombuffer(text, np.uint8),
            is_stopped,
        )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - begin


class _Answer(NamedTuple):
    """An answer on its way: ids int32 [A], logprobs fp32 [A], text in UTF-8."""

    ids: np.ndarray
    logprobs: np.ndarray
    text: np.ndarray
    is_stopped: bool


def _runs(first: int, last: int, samples: int) -> Iterator[tuple[int, int, int]]:
    """The answers first to last of all, by prompt: (prompt, first sample, the sample behind the last)."""
    while first < last:
        at, begin = divmod(first, samples)
        end = min(samples, begin + last - first)
        yield at, begin, end
        first += end - begin


def _exchange(own: Sequence[_Answer], first: int, count: int, runtime: Runtime) -> list[_Answer]:
    """All ranks' answers, in order. Every rank writes its part into zeros; the sum over ranks is the whole.

    Args:
        first: number of the first of this rank's, of `count` in all.
    """
    sizes = torch.zeros(count, 3, dtype=torch.int64)
    for number, answer in enumerate(own, first):
        sizes[number] = torch.tensor((len(answer.ids), len(answer.text), answer.is_stopped))
    sizes = runtime.sum(sizes.to(runtime.device)).cpu()
    bounds = np.append(0, np.cumsum(8 * sizes[:, 0].numpy() + sizes[:, 1].numpy()))
    content = np.zeros(bounds[-1], np.uint8)
    content[bounds[first] : bounds[first + len(own)]] = np.concatenate(
        [np.zeros(0, np.uint8), *(part.view(np.uint8) for answer in own for part in answer[:3])]
    )
    content = runtime.sum(torch.from_numpy(content).to(runtime.device)).cpu().numpy()
    answers = []
    for begin, (tokens, _, is_stopped), end in zip(bounds[:-1], sizes.tolist(), bounds[1:], strict=True):
        ids, logprobs, text = np.split(content[begin:end], (4 * tokens, 8 * tokens))
        answers.append(_Answer(ids.view(np.int32), logprobs.view(np.float32), text, bool(is_stopped)))
    return answers
