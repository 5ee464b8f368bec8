"""How the next token is chosen: the options of a request, and the choice for many rows at once.

    x     = logits; of tokens that were seen, x / r where x >= 0 and x r where x < 0          (Keskar et al. 2019)
    p     = softmax(x / temperature)
    token ~ p restricted to x >= cut, the largest of

        top-k   the k-th largest x                                                            (Fan et al. 2018)
        top-p   the least x_i for which less than top_p of p lies above it, p being cut to the top k already
                                                                                              (Holtzman et al. 2020)
        min-p   max x + temperature log min_p, so that p_i >= min_p max p                     (Nguyen et al. 2024)

So every filter is one number a row, and none of them needs to know where a token stands in the order. The sets are
those of transformers, which applies the same steps in the same order. Ties: tokens of equal x are kept or dropped
together. At the k-th place transformers does the same; at the border of top-p it keeps a part of them, as its sort
happens to leave them.

The log-probability that comes with a token is the model's own: softmax(logits / temperature) over the whole
vocabulary, before penalty and filters, at temperature 0 softmax(logits). It is what a forward pass over the finished
text gives again. It is also what the token was drawn from if there is no penalty and no filter; rollouts whose
importance ratios must be exact use none.

Cost beside `kernels.sample`: nothing while no row in the batch asks for more. Otherwise the logits are copied once,
and ranked as deeply as the deepest row needs: 1 for min-p, the largest k for top-k, with or without top-p. Only top-p
without top-k needs all of them, as its border may lie anywhere: on a GPU, where nobody waits to look, a sort of
[B, V]; on a CPU the first thousand, and more if they do not do. All rows then go the same way, because choosing some
of them would need a shape that changes from step to step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backend import accumulation_dtype, next_power_of_2
from kernels.sample import sample
from model.errors import InputError

# How many logits a CPU ranks before it looks whether the border of top-p is among them.
FIRST_RANKED = 1024
# Below the smallest normal number of fp32, `kernels.sample` takes a temperature for 0.
_SMALLEST = 2.0**-126


@dataclass(frozen=True)
class SamplingOptions:
    """What a request asks of its answer.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens that hold this much probability together; 1 keeps all.
    min_p: keep tokens at least this likely relative to the likeliest; 0 keeps all.
    repetition_penalty: divides the positive and multiplies the negative logits of tokens that the prompt or the
        answer holds already; 1 is none.
    max_new_tokens: the longest answer.
    stop_ids: tokens that end an answer.
    stop_texts: texts that end an answer and do not belong to it.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # 1000 flattens any logits that fp32 sums are made for; 1e-3 and 1e3 keep penalised logits finite.
        self._check("temperature", "a number from 0 to 1000", lambda x: 0 <= x <= 1000)
        self._check("top_k", "a whole number, 0 or more", lambda x: isinstance(x, int) and x >= 0)
        self._check("top_p", "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        self._check("min_p", "a number from 0 to 1", lambda x: 0 <= x <= 1)
        self._check("repetition_penalty", "a number from 0.001 to 1000", lambda x: 1e-3 <= x <= 1e3)
        self._check("max_new_tokens", "a whole number, 1 or more", lambda x: isinstance(x, int) and x >= 1)
        for name, kind, what in ("stop_ids", int, "token ids"), ("stop_texts", str, "texts that are not empty"):
            value = getattr(self, name)
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            if not is_list or not all(isinstance(x, kind) and x != "" for x in value):
                raise InputError(f"sampling option {name} is {value!r}; give a list of {what}.")
            object.__setattr__(self, name, tuple(value))

    def _check(self, name: str, what: str, is_right: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_right(value):
            raise InputError(f"sampling option {name} is {value!r}; give {what}.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _SMALLEST


def row_seed(seed: int, sample: int) -> int:
    """The seed of one of a request's samples, a signed 64-bit number.

    Hashed, since sums would let sample 1 of seed 7 and sample 0 of seed 8 draw alike.
    """
    digest = hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Filters(NamedTuple):
    """What `choose` does beside drawing. A captured CUDA graph of it holds as long as this stays the same.

    ranked: how many of the largest logits may have to be ranked, 0 if nothing is filtered.
    has_top_p: whether masses are summed.
    is_penalised: whether repetition penalties are applied.
    """

    ranked: int = 0
    has_top_p: bool = False
    is_penalised: bool = False


class TokenChooser:
    """Options, seeds and histories of the rows of a decoding batch, and the choice of their next tokens.

    A row is a place, 0 to max_rows - 1, taken by one sequence after the other. What it draws depends on its seed, on
    its step (how many tokens its answer holds), on its options and its logits: never on the place or on other rows.

    filters: what the rows now seated need.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.filters = Filters()
        self._vocab_size = vocab_size
        self._seated: dict[int, SamplingOptions] = {}
        self._seed_and_step = torch.zeros(2, max_rows, dtype=torch.int64, device=device)
        self._temperature = torch.zeros(max_rows, device=device)
        # top_k (the size of the vocabulary for none), top_p, min_p, repetition_penalty
        self._options = torch.ones(4, max_rows, dtype=torch.float64, device=device)
        self._seen: Tensor | None = None  # bool [max_rows, V], made when the first row asks for a penalty

    def seat(self, row: int, options: SamplingOptions, seed: int, ids: Sequence[int] = (), step: int = 0) -> None:
        """Give a place to a sequence; one that sat there is forgotten. Nothing waits for the device.

        Args:
            seed: signed 64 bits, see `row_seed`.
            ids: prompt and answer so far, for the repetition penalty.
            step: tokens of the answer among them: 0, or more when a row comes back after it had to leave.
        """
        self._seated[row] = options
        top_k = min(options.top_k or self._vocab_size, self._vocab_size)
        filters = top_k, options.top_p, options.min_p, options.repetition_penalty
        self._seed_and_step[:, row].copy_(torch.tensor((seed, step)), non_blocking=True)
        self._temperature[row].fill_(options.temperature)  # assigned, it would be copied, and the copy waited for
        self._options[:, row].copy_(torch.tensor(filters, dtype=torch.float64), non_blocking=True)
        if options.repetition_penalty != 1:
            if self._seen is None:
                shape = len(self._temperature), self._vocab_size
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self._temperature.device)
            seen = torch.tensor(sorted(set(ids)), dtype=torch.int64).to(self._seen.device, non_blocking=True)
            self._seen[row].zero_().index_fill_(0, seen, True)
        self._plan()

    def leave(self, row: int) -> None:
        """The sequence of a row is finished, or has to wait."""
        del self._seated[row]
        self._plan()

    def choose(self, logits: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next token of some rows; their steps and histories advance. Nothing waits for the device.

        Args:
            logits: [B, V], any float dtype; one row may be repeated (`expand`).
            rows: int64 [B], the places of these sequences, none twice; None for places 0 to B - 1.
        Returns:
            (token int64 [B], logprob fp32 [B]): of the token under softmax(logits / temperature), see above.
        """
        index = slice(len(logits)) if rows is None else rows
        seeds, step = self._seed_and_step[:, index]
        temperature = self._temperature[index]
        if self.filters == Filters():
            token, logprob = sample(logits, temperature, seeds, step)
        else:
            token, logprob = self._choose_filtered(logits, index, temperature, seeds, step)
        self._seed_and_step[1, index] = step + 1
        return token, logprob

    def _plan(self) -> None:
        seated = self._seated.values()
        ranked = max((_ranked(options, self._vocab_size) for options in seated), default=0)
        self.filters = Filters(
            # A power of two, so that few different numbers, and graphs, come up.
            ranked=min(next_power_of_2(ranked), self._vocab_size) if ranked else 0,
            has_top_p=any(options.top_p < 1 and not options.is_greedy for options in seated),
            is_penalised=any(options.repetition_penalty != 1 for options in seated),
        )

    def _choose_filtered(
        self, logits: Tensor, index: slice | Tensor, temperature: Tensor, seeds: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        top_k, top_p, min_p, penalty = self._options[:, index].unsqueeze(2)  # [B, 1] each
        is_plain = (top_k == self._vocab_size) & (top_p == 1) & (min_p == 0) & (penalty == 1)
        logits = logits.to(accumulation_dtype(logits.dtype))
        divisor = temperature.where(temperature >= _SMALLEST, 1).unsqueeze(1)
        seen = self._seen if self.filters.is_penalised else None
        x = logits if seen is None else penalise(logits, seen[index], penalty.to(logits.dtype))
        kept = x
        if self.filters.ranked:
            kept = x.masked_fill(x < least_kept(x, divisor, top_k, top_p, min_p, self.filters), -math.inf)
        token, drawn_logprob = sample(kept, temperature, seeds, step)
        if seen is not None:
            # From the device: a number of the host would be copied there, which no graph can hold.
            places = torch.arange(len(x), device=x.device) if isinstance(index, slice) else index
            seen[places, token] = seen.new_ones(())
        scaled = (logits - logits.amax(dim=1, keepdim=True)) / divisor
        own = scaled.gather(1, token.unsqueeze(1)) - scaled.logsumexp(dim=1, keepdim=True)
        # A row without filters has bitwise the log-probability that it has without neighbours.
        return token, drawn_logprob.where(is_plain.squeeze(1), own.squeeze(1))


def _ranked(options: SamplingOptions, vocab_size: int) -> int:
    """How many of the largest logits decide where a row's cut lies."""
    if options.is_greedy:
        return 0
    if 0 < options.top_k < vocab_size:
        return options.top_k
    if options.top_p < 1:
        return vocab_size
    return 1 if options.min_p > 0 else 0


def penalise(logits: Tensor, is_seen: Tensor, penalty: Tensor) -> Tensor:
    """Logits [B, V], those of seen tokens (bool [B, V]) divided by penalty [B, 1], or multiplied where negative."""
    return torch.where(is_seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def least_kept(x: Tensor, divisor: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, filters: Filters) -> Tensor:
    """The cut of each row: tokens with smaller logits are not drawn.

    Args:
        x: [B, V] logits.
        divisor: [B, 1] temperatures, positive.
        top_k: [B, 1], V for none.
        top_p, min_p: [B, 1] fp64, 1 and 0 for none.
        filters: what the rows need; more changes nothing.
    Returns:
        [B, 1], dtype of x.
    """
    columns, depth = x.shape[1], filters.ranked
    if not x.is_cuda:
        depth = min(depth, FIRST_RANKED)
    while True:
        ranking = (x.topk(depth, dim=1) if depth < columns else x.sort(dim=1, descending=True)).values
        top, kth = ranking[:, :1], ranking.gather(1, top_k.long().clamp(max=depth) - 1)
        cut = kth.where(top_k <= depth, -math.inf)
        is_settled = (top_k <= depth) | (top_k == columns)
        if filters.has_top_p:
            # Masses relative to the likeliest token's, in fp64: sums over a vocabulary, compared with a top_p near 1.
            total = ((x - top).double() / divisor).exp().where(x >= cut, 0).sum(dim=1, keepdim=True)
            mass = ((ranking - top).double() / divisor).exp()
            count = (mass.cumsum(dim=1) - mass < top_p * total).sum(dim=1, keepdim=True)
            last = ranking.gather(1, count.clamp(min=1) - 1)  # no token counts, if the row holds NaN
            cut = cut.maximum(last.where(top_p < 1, -math.inf))
            is_settled &= (top_p == 1) | (count < depth)
        if depth == filters.ranked or is_settled.all():
            return cut.maximum((top + divisor * min_p.log()).to(x.dtype))
        depth = min(8 * depth, filters.ranked)
