"""The device's part of generation: prefills, first tokens, and the decoding step with its CUDA graphs.

A running row has a seat: its index in every tensor that outlives a step. What the host knows of a step (seats,
positions, tables of pages) it sends in one copy; what only the device knows, the last tokens, stays there by seat.
So a step can be launched before the tokens of the one before it were read.

On a GPU the whole step, from the copy's arrival to the chosen tokens, is one CUDA graph a number of rows. Tensors
have fixed places, and rows that fill up the number sit on a seat and write to a page that belong to nobody. On a CPU
the same code runs as it is, on the rows there are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.vocabulary import HeadProducts
from model.batch import Layout
from model.heads import CausalLM
from model.kv_cache import PAGE, Decode, KVCache, Prefill, pages_for
from model.sampling import TokenChooser
from model.scheduler import Chunk, Row, Start


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for.

    A decoding step reads all weights whatever the number of rows, and a matrix instruction takes 16 of them: from
    there on multiples of 16 waste less than one instruction, below powers of two bound the waste of attention. A
    graph takes a second to capture and some megabytes, so not every number has one.
    """
    sizes = [size for size in (1, 2, 4, 8) if size < max_rows]
    return [*sizes, *range(16, max_rows, 16), max_rows]


@functools.cache
def capture_stream(device: torch.device) -> Any:
    """The stream of a device that all graphs are captured on, whoever captures them.

    Freed memory is reused on its own stream alone, so graphs on several streams would share none of their pool; and
    cuBLAS keeps a workspace, 32 MiB on Hopper, for every stream that it was ever called on.
    """
    return torch.cuda.Stream(device)


@contextmanager
def places_are_distinct() -> Iterator[None]:
    """Within the context PyTorch may write to the places of an index in any order.

    Told to be deterministic, as training tells it, it sorts them on a GPU before it writes: a dozen small kernels for
    the keys and again for the values of every layer, in every decoding step. Ours are distinct, but for rows of nobody.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=only_warns)


@dataclass(frozen=True)
class Result:
    """Tokens and log-probabilities of rows, on their way to the host."""

    rows: Sequence[Row]
    tokens: Tensor
    logprobs: Tensor
    arrived: Any = None  # a CUDA event

    def read(self) -> list[tuple[Row, int, float]]:
        """Waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return list(zip(self.rows, self.tokens.tolist(), self.logprobs.tolist(), strict=True))


class Inputs:
    """What a decoding step is told by the host: one block of int32, so that it is one copy.

    seats, positions: [R]. tables: [R, W] pages.
    """

    def __init__(self, rows: int, width: int, device: torch.device | str, is_pinned: bool = False) -> None:
        self.block = torch.zeros(rows * (2 + width), dtype=torch.int32, device=device, pin_memory=is_pinned)
        self.seats, self.positions = self.block[: 2 * rows].view(2, rows)
        self.tables = self.block[2 * rows :].view(rows, width)


class Decoder:
    """Runs a model over a cache.

    Args:
        context: the longest sequence.
        sizes: numbers of rows that steps are filled up to; None for none.
    """

    def __init__(self, model: CausalLM, cache: KVCache, max_rows: int, context: int, sizes: list[int] | None) -> None:
        self.model, self.cache, self.max_rows, self.sizes = model, cache, max_rows, sizes
        self.device = cache.data.device
        self.head = HeadProducts(model.head_weight)
        nobody = 1  # a seat for the rows that fill up
        self.chooser = TokenChooser(max_rows + nobody, model.config.vocab_size, self.device)
        self._latest = torch.zeros(max_rows + nobody, dtype=torch.int64, device=self.device)
        width = pages_for(context)
        self._inputs = Inputs(max_rows, width, self.device)
        # Two in turn: a copy may still be on its way while the host writes the next step's.
        is_cuda = self.device.type == "cuda"
        self._host = [Inputs(max_rows, width, "cpu", is_pinned=is_cuda) for _ in range(2)]
        self._tables = torch.zeros(max_rows + nobody, width, dtype=torch.int32)  # by seat
        self._held = [0] * max_rows  # how much of it is written
        self._graphs: dict[Any, tuple[Any, Tensor, Tensor]] = {}
        self._graph_memory: Any = None

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Compute chunks of prompts in one flat batch."""
        ids = [token for chunk in chunks for token in chunk.prompt.ids[chunk.start : chunk.end]]
        tables = [chunk.prompt.pages[: pages_for(chunk.end)] for chunk in chunks]
        lengths_q, lengths_k = [chunk.end - chunk.start for chunk in chunks], [chunk.end for chunk in chunks]
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
        pages = [chunk.prompt.pages[i // PAGE] for chunk in chunks for i in range(chunk.start, chunk.end)]
        tokens, at, in_page = self._send(torch.tensor((ids, positions, pages)))
        places = self.cache.places(in_page, at % PAGE)
        cu_seqlens_q = self._send(cumulative(lengths_q))
        table = None
        cu_seqlens_k = cu_seqlens_q
        if any(chunk.start for chunk in chunks):
            cu_seqlens_k = self._send(cumulative(lengths_k))
            width = max(map(len, tables))
            table = self._send(torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32))
        layout = Layout(cu_seqlens_q, cu_seqlens_k, max(lengths_q), max(lengths_k))
        with places_are_distinct():
            hidden = self.model.model(tokens, at, None, cache=Prefill(self.cache, places, layout, table))
        last = cu_seqlens_q[1:] - 1
        for chunk, of_last in zip(chunks, hidden[last.long()], strict=True):
            if chunk.prompt.is_computed:
                chunk.prompt.hidden = of_last

    def start(self, starts: Sequence[Start]) -> Result:
        """Seat rows and choose their first tokens."""
        self._copy([start.copy for start in starts if start.copy is not None])
        for _, row, _ in starts:
            self._held[row.seat] = 0
            self.chooser.seat(row.seat, row.options, row.seed, row.prompt + row.ids, len(row.ids))
            row.launched += 1
        seats = self._send(torch.tensor([start.row.seat for start in starts]))
        hidden = torch.stack([start.prompt.hidden for start in starts])
        return self._result([start.row for start in starts], *self._choose(hidden, seats))

    def move(self, moves: dict[int, int]) -> None:
        """Copy pages to the places that their holders name by now."""
        self._copy(list(moves.items()))
        if moves:
            self._held = [0] * self.max_rows

    def decode(self, rows: Sequence[Row]) -> Result:
        """One more token for each row."""
        count = len(rows)
        size = count if self.sizes is None else next(size for size in self.sizes if size >= count)
        host = self._host[0]
        self._host.reverse()
        seats = [row.seat for row in rows] + [self.max_rows] * (size - count)
        host.seats[:size] = torch.tensor(seats)
        host.positions[:size] = torch.tensor([row.length for row in rows] + [0] * (size - count))
        for row in rows:
            if len(row.pages) != self._held[row.seat]:
                self._tables[row.seat, : len(row.pages)] = torch.tensor(row.pages)
                self._held[row.seat] = len(row.pages)
            row.launched += 1
        host.tables[:size] = self._tables[seats]
        if self.device.type == "cuda":
            tokens, logprobs = self._replay(size, host)
        else:
            width = host.tables.shape[1] if self.sizes else max(len(row.pages) for row in rows)
            tokens, logprobs = self._step(host.seats[:size], host.positions[:size], host.tables[:size, :width])
        return self._result(rows, tokens[:count], logprobs[:count])

    def leave(self, seat: int) -> None:
        self.chooser.leave(seat)

    def _step(self, seats: Tensor, positions: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
        """The decoding step, from int32 seats [B], positions [B] and tables [B, W] to tokens and log-probabilities."""
        seats, positions = seats.long(), positions.long()
        page = tables.gather(1, (positions // PAGE).unsqueeze(1)).squeeze(1)
        places = self.cache.places(page, positions % PAGE)
        cache = Decode(self.cache, places, (positions + 1).int(), tables)
        hidden = self.model.model(self._latest[seats], positions, None, cache=cache)
        return self._choose(hidden, seats)

    def _choose(self, hidden: Tensor, seats: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head.logits(hidden)  # [B, V]
        tokens, logprobs = self.chooser.choose(logits, seats)
        self._latest[seats] = tokens
        return tokens, logprobs

    def _copy(self, pages: Sequence[tuple[int, int]]) -> None:
        if pages:
            self.cache.copy_pages(*self._send(torch.tensor(pages).t()))

    def _replay(self, size: int, host: Inputs) -> tuple[Tensor, Tensor]:
        key = size, self.chooser.filters
        if key not in self._graphs:
            with places_are_distinct():
                self._graphs[key] = self._capture(size)
        graph, tokens, logprobs = self._graphs[key]
        self._inputs.block.copy_(host.block, non_blocking=True)
        graph.replay()
        return tokens, logprobs

    def _capture(self, size: int) -> tuple[Any, Tensor, Tensor]:
        """Record the step for a number of rows. It runs a few times on nobody's seat, so kernels are ready."""
        inputs = self._inputs
        inputs.block.zero_()
        inputs.seats.fill_(self.max_rows)
        arguments = inputs.seats[:size], inputs.positions[:size], inputs.tables[:size]
        stream = capture_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(*arguments)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Its stream, for the current device may be another; and other threads may go on, such as one that pins memory.
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=stream, capture_error_mode="thread_local"):
            tokens, logprobs = self._step(*arguments)
        self._graph_memory = graph.pool()
        return graph, tokens, logprobs

    def _result(self, rows: Sequence[Row], tokens: Tensor, logprobs: Tensor) -> Result:
        if self.device.type != "cuda":
            return Result(rows, tokens, logprobs)
        tokens, logprobs = (
            torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in (tokens, logprobs)
        )
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return Result(rows, tokens, logprobs, event)

    def _send(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x


def cumulative(lengths: Sequence[int]) -> Tensor:
    """int32 [D+1] bounds."""
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
