"""Generation in process: requests in, completions out, many at a time.

    generator = Generator.from_directory("ckpt/sft")
    for completion in generator.generate([Request(ids, SamplingOptions(temperature=0.7, stop_ids=(eos,)))]): ...

A step prefills waiting prompts, starts rows in the places that are free, and decodes one token for every row
(`model.scheduler` says which, `model.decoding` computes them). What comes out is read by the host, one step late on a
GPU: while the device is at a step, the host learns which rows ended in the one before. A row that did has been given
one token too many, which is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.linear import pack
from kernels.vocabulary import HeadProducts
from model.config import ModelConfig, parameter_shapes
from model.decoding import Decoder, Result, graph_sizes
from model.errors import InputError
from model.heads import CausalLM
from model.hf import load_config, read_model
from model.kv_cache import KVCache, count_pages
from model.layers import Linear
from model.sampling import SamplingOptions, row_seed
from model.scheduler import Prompt, Row, Scheduler
from model.scoring import score
from model.streaming import TextStream
from model.tokenizer import Tokenizer

EndReason = Literal["stop", "length"]
# Tokens prefilled between two decoding steps: enough to use the device fully, half a second of a 13B model on an
# H100 for rows that wait.
PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    prompt: ids, at least one.
    samples: how many answers; they share one prefill.
    seed: requests with one seed, prompt and options get one answer; the samples of a request differ.
    first_sample: number of the first one, where others are drawn elsewhere: what sample n is depends on seed and n.
    """

    prompt: Sequence[int]
    options: SamplingOptions = field(default_factory=SamplingOptions)
    samples: int = 1
    seed: int = 0
    first_sample: int = 0


@dataclass
class Completion:
    """An answer.

    request, sample: which one; requests are numbered from 0, samples from the request's first.
    ids: of the answer, with the token that ended it.
    logprobs: of the ids, under softmax(logits / temperature) of the whole vocabulary.
    end_reason: "stop" at a stop token or text; "length" at max_new_tokens or the end of the context.
    text: without the token or text that ended it; None without a tokenizer.
    """

    request: int
    sample: int
    ids: list[int]
    logprobs: list[float]
    end_reason: EndReason
    text: str | None


@dataclass(frozen=True)
class Event:
    """One token of an answer.

    text: what the token adds to the text, complete characters only; "" without a tokenizer.
    end_reason: with the last token, else None.
    """

    request: int
    sample: int
    id: int
    logprob: float
    text: str
    end_reason: EndReason | None


class Generator:
    """A model that answers requests, with weights of its own.

    Args:
        tokenizer: for texts and stop texts; ids are enough for everything else.
        device: the GPU if there is one.
        dtype: of weights and cache: bfloat16 on a GPU, float32 on a CPU.
        cache_bytes: memory for keys and values; by default a share of what there is, at most what can be used.
        max_rows: answers that are decoded at once.
        context: the longest prompt with its answer; by default the model's.
    Raises:
        InputError: the memory does not hold one sequence of that context, or nobody could be answered.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tokenizer: Tokenizer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_bytes: int | None = None,
        max_rows: int = 64,
        context: int | None = None,
    ) -> None:
        if max_rows < 1:
            raise InputError(f"max_rows is {max_rows}. Use at least 1.")
        if context is not None and context < 2:
            raise InputError(f"A context of {context} tokens holds no prompt and answer. Use at least 2.")
        self.config = config if context is None else config.with_context(context)
        self.context = self.config.rope_length
        self.tokenizer = tokenizer
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self._max_rows, self._cache_bytes = max_rows, cache_bytes
        self._is_late = self.device.type == "cuda"
        self._pending: deque[Result] = deque()
        self._live: dict[int, list[Row]] = {}  # by request
        self._texts: dict[Row, TextStream] = {}
        self._requests = 0
        self._allocate()

    def _allocate(self) -> None:
        """Take the memory: of the weights, then of the cache, whose size may depend on what they leave."""
        with torch.device("meta"):
            model = CausalLM(self.config)
        self.model = model.to(self.dtype).requires_grad_(False).to_empty(device=self.device)
        pages = count_pages(self.config, self.context, self._max_rows, self.device, self.dtype, self._cache_bytes)
        self.cache = KVCache(self.config, pages, self.device, self.dtype)
        sizes = graph_sizes(self._max_rows) if self._is_late else None
        self._decoder = Decoder(self.model, self.cache, self._max_rows, self.context, sizes)
        self._scheduler = Scheduler(pages, self._max_rows, PREFILL_TOKENS)

    @classmethod
    def from_directory(
        cls,
        directory: Path | str,
        *,
        tokenizer: Tokenizer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_bytes: int | None = None,
        max_rows: int = 64,
        context: int | None = None,
    ) -> Generator:
        """With the weights, and unless another is given the tokenizer, of a model directory."""
        generator = cls(
            load_config(directory, "lm"),
            tokenizer=tokenizer or Tokenizer.load(directory),
            device=device,
            dtype=dtype,
            cache_bytes=cache_bytes,
            max_rows=max_rows,
            context=context,
        )
        generator.load(read_model(directory, generator.config))
        return generator

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over weights, in place: captured graphs go on with the new ones. After `release`, memory is taken first.

        Args:
            tensors: (name, full tensor) for every name of `parameter_shapes`, in any order, dtype and place; one is
                held at a time.
        Raises:
            InputError: names are missing, unknown or given twice, or a shape is wrong. The weights are then neither
                the old nor the new ones: load again before anything else. Or, after `release`: the memory does not
                hold one sequence.
        """
        assert self.is_idle, "load() while requests are running"
        if self.is_released:
            self._allocate()
        self.cache.clear()
        shapes, missing = parameter_shapes(self.config), set(parameter_shapes(self.config))
        for name, tensor in tensors:
            if name not in shapes:
                raise InputError(f"{name} is not a parameter of this model. Give the names of parameter_shapes.")
            if name not in missing:
                raise InputError(f"{name} is given twice. Give every parameter once.")
            if tensor.shape != shapes[name]:
                raise InputError(f"{name} is {list(tensor.shape)}, but this model needs {list(shapes[name])}.")
            self._put(name, tensor.detach())
            missing.remove(name)
        if missing:
            raise InputError(f"{', '.join(sorted(missing))} missing. Give every parameter once.")
        self._decoder.head = HeadProducts(pack(self.model.head_weight))

    def release(self) -> None:
        """Give back all memory of weights, cache and captured graphs, until the next `load` takes it anew."""
        assert self.is_idle, "release() while requests are running"
        self._pending.clear()
        if not self.is_released:
            del self.model, self.cache, self._decoder
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # a graph's memory is its own until then

    @property
    def is_released(self) -> bool:
        """Whether there are no weights now."""
        return not hasattr(self, "model")

    @torch.no_grad()
    def _put(self, name: str, tensor: Tensor) -> None:
        """A parameter's new value, in its place: or on a CPU in the layout that multiplies fastest."""
        path, _, kind = name.rpartition(".")
        module = self.model.get_submodule(path)
        if self.device.type == "cpu" and isinstance(module, Linear) and kind == "weight":
            tensor = pack(tensor.to(self.device, self.dtype))
        if tensor.is_mkldnn:
            module.weight = nn.Parameter(tensor, requires_grad=False)
        else:
            getattr(module, kind).copy_(tensor, non_blocking=True)

    @property
    def is_idle(self) -> bool:
        """Whether every answer is over. What is still launched then belongs to nobody, and is passed over when read."""
        return self._scheduler.is_idle

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return len(self._scheduler.running)

    def generate(self, requests: Sequence[Request], beat: Callable[[], None] | None = None) -> list[Completion]:
        """Answers in the order of requests, the samples of one side by side.

        Args:
            beat: called for every token, to tell whoever watches that the work goes on.
        """
        text = None if self.tokenizer is None else ""
        answers = {
            (number, sample): Completion(number, sample, [], [], "length", text)
            for number, request in enumerate(requests)
            for sample in range(request.first_sample, request.first_sample + request.samples)
        }
        for event in self.stream(requests):
            if beat is not None:
                beat()
            answer = answers[event.request, event.sample]
            answer.ids.append(event.id)
            answer.logprobs.append(event.logprob)
            answer.end_reason = event.end_reason or answer.end_reason
            if answer.text is not None:
                answer.text += event.text
        return list(answers.values())

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Tokens as they come, of requests numbered from 0. Closing the iterator cancels what is not done."""
        assert self.is_idle, "other requests are running: use add() and step()"
        first = self._requests
        try:
            for request in requests:
                self.add(request)
            while not self.is_idle:
                for event in self.step():
                    yield replace(event, request=event.request - first)
        finally:
            for number in range(first, self._requests):
                self.cancel(number)
            self._pending.clear()

    def check(self, request: Request) -> None:
        """See whether a request can be answered; safe beside a thread that steps.

        Raises:
            InputError: the prompt is empty, leaves no room for an answer, or holds ids that the model does not know;
                no samples are asked for, or stop texts without a tokenizer.
        """
        prompt = request.prompt
        if not prompt:
            raise InputError("The prompt is empty. Give at least one token, such as the tokenizer's bos token.")
        if len(prompt) >= self.context:
            raise InputError(
                f"The prompt has {len(prompt)} tokens; a context of {self.context} leaves room for at most "
                f"{self.context - 1}. Shorten the prompt, or give a longer context."
            )
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise InputError(
                f"The prompt holds ids from {min(prompt)} to {max(prompt)}; the model knows 0 to "
                f"{self.config.vocab_size - 1}. Use the model's own tokenizer."
            )
        if request.samples < 1:
            raise InputError(f"samples is {request.samples}. Ask for at least 1.")
        if request.options.stop_texts and self.tokenizer is None:
            raise InputError("stop_texts need a tokenizer. Give one, or use stop_ids.")

    def add(self, request: Request) -> int:
        """Queue a request; its number comes back with its events.

        Raises:
            InputError: as `check`, or texts cannot be streamed with the tokenizer. Nothing is queued then.
        """
        assert not self.is_released, "load() weights before requests"
        self.check(request)
        prompt = list(request.prompt)
        number = self._requests
        limit = min(request.options.max_new_tokens, self.context - len(prompt))
        rows = [
            Row(number, sample, prompt, request.options, row_seed(request.seed, sample), limit)
            for sample in range(request.first_sample, request.first_sample + request.samples)
        ]
        if self.tokenizer is not None:  # a tokenizer that cannot be streamed is refused here
            self._texts |= {row: TextStream(self.tokenizer, row.options.stop_texts) for row in rows}
        self._live[number] = list(rows)
        self._requests += 1
        self._scheduler.add(Prompt(prompt, deque(rows)))
        return number

    def cancel(self, request: int, sample: int | None = None) -> None:
        """End an answer, or all of a request's; no more events of it come. Those that are over are left alone."""
        for row in list(self._live.get(request, ())):
            if sample is None or row.sample == sample:
                self._end(row)

    def score(
        self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[list[float]]]:
        """Log-probabilities of the tokens of given continuations, any number for each prefix; `model.scoring`.

        Requests that are running go on undisturbed.
        """
        return [[one.logprobs for one in own] for own in score(self.model, prefixes, continuations)]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Do a little of everything that is due; the tokens that arrived."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            events = self._prefill_and_start()
            return events + self._decode()

    def _prefill_and_start(self) -> list[Event]:
        chunks = self._scheduler.next_prefill()
        if chunks:
            self._decoder.prefill(chunks)
        starts = self._scheduler.next_starts()
        if starts:
            self._pending.append(self._decoder.start(starts))
        return self._read(keep=len(self._pending) if self._is_late else 0)

    def _decode(self) -> list[Event]:
        events: list[Event] = []
        while (rows := self._scheduler.next_decode()) is None:
            # Rows that ended may have left pages; if all that was launched is known, somebody has to.
            if self._pending:
                events += self._read()
            elif (seat := self._scheduler.give_way()) is not None:
                self._decoder.leave(seat)
        if rows:
            if self.device.type == "cpu":
                self._decoder.move(self._scheduler.next_moves())
            self._pending.append(self._decoder.decode(rows))
        return events + self._read(keep=1 if self._is_late and rows else 0)

    def _read(self, keep: int = 0) -> list[Event]:
        """The tokens of all launches but the last `keep`."""
        events = []
        while len(self._pending) > keep:
            for row, token, logprob in self._pending.popleft().read():
                if not row.is_over:
                    row.ids.append(token)
                    events.append(self._event(row, token, logprob))
        return events

    def _event(self, row: Row, token: int, logprob: float) -> Event:
        stream, text = self._texts.get(row), ""
        reason: EndReason | None = None
        is_stop = token in row.options.stop_ids
        if stream is not None and not is_stop:
            text = stream.push(token)
        if is_stop or (stream is not None and stream.is_stopped):
            reason = "stop"
        elif len(row.ids) == row.limit:
            reason = "length"
        if reason is not None:
            if stream is not None:
                text += stream.finish()
                reason = "stop" if stream.is_stopped else reason  # characters held back to the end may complete one
            self._end(row)
        return Event(row.request, row.sample, token, logprob, text, reason)

    def _end(self, row: Row) -> None:
        seat = self._scheduler.end(row)
        if seat is not None:
            self._decoder.leave(seat)
        self._texts.pop(row, None)
        self._live[row.request].remove(row)
        if not self._live[row.request]:
            del self._live[row.request]
