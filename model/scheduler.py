"""Which sequences are computed next, and where in the cache they lie. No tensors: plans go out, data comes back.

A `Prompt` waits until there are rows and pages for it, is prefilled chunk by chunk, and then starts its rows, one for
each of its samples. A `Row` decodes a token a step until it ends. `max_rows` rows decode at once; the place of one
that ends is taken in the next step.

    waiting ── next_prefill ──► ready ── next_starts ──► running ── end ──► gone
       ▲                                                    │
       └──────────────────── give way ──────────────────────┘

Pages are taken as they are filled, not reserved for the longest answer: most answers are far shorter, and the rows
that a reservation keeps out cost more than the few that have to give way. When none is left, prompts that have not
started go back to wait; then the row that started last gives way. It keeps its tokens and becomes a prompt of its
own, prompt and answer so far, at the head of the queue. Its draws depend on its seed and step, so it goes on as it
would have. Every sequence fits the cache alone, hence the oldest row always goes on, and all of them end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from model.kv_cache import PAGE, PagePool, pages_for
from model.sampling import SamplingOptions


@dataclass(eq=False)
class Row:
    """One answer on its way.

    ids: of the answer, as far as they are known to the host.
    launched: tokens of the answer that the device was asked for, at least len(ids).
    limit: the longest answer.
    seat: its place in the tensors of the device, while it runs.
    pages: in the order of its tokens, while it runs.
    """

    request: int
    sample: int
    prompt: list[int]
    options: SamplingOptions
    seed: int
    limit: int
    ids: list[int] = field(default_factory=list)
    launched: int = 0
    seat: int = -1
    pages: list[int] = field(default_factory=list)
    is_over: bool = False

    @property
    def length(self) -> int:
        """Tokens whose keys are in the cache, or will be when the next decoding step begins."""
        return len(self.prompt) + self.launched - 1


@dataclass(eq=False)
class Prompt:
    """Tokens to be prefilled, and the rows that go on from there.

    computed: how many of the tokens are in the cache.
    rows: those that have not started.
    hidden: the last token's, once it is computed; whoever computes it puts it here.
    """

    ids: list[int]
    rows: deque[Row]
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    hidden: Any = None

    @property
    def is_computed(self) -> bool:
        return self.computed == len(self.ids)


class Chunk(NamedTuple):
    """Tokens start to end of a prompt, to be prefilled; pages for them are there."""

    prompt: Prompt
    start: int
    end: int


class Start(NamedTuple):
    """A row that begins. copy: the prompt's last page and the row's own copy of it, or None if the row keeps it."""

    prompt: Prompt
    row: Row
    copy: tuple[int, int] | None


class Scheduler:
    """Queues and pages.

    Args:
        pages: of the cache, the one that belongs to nobody included.
        prefill_tokens: the most that are prefilled between two decoding steps: how long running rows wait.
    """

    def __init__(self, pages: int, max_rows: int, prefill_tokens: int) -> None:
        self.pool = PagePool(pages)
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Prompt] = deque()
        self.ready: deque[Prompt] = deque()  # hold pages, in part or in whole computed
        self.running: list[Row] = []  # in the order in which they started
        self._seats = list(range(max_rows - 1, -1, -1))

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.ready or self.running)

    def add(self, prompt: Prompt) -> None:
        self.waiting.append(prompt)

    def next_prefill(self) -> list[Chunk]:
        """The next chunks, of at most prefill_tokens together."""
        chunks = []
        if self.ready and not self.ready[-1].is_computed:  # no other can be: nobody is let in behind it
            chunks.append(self._chunk(self.ready[-1], self.prefill_tokens))
        expected = sum(len(prompt.rows) for prompt in self.ready)
        while self.waiting and len(self._seats) > expected and self._fits(self.waiting[0]):
            budget = self.prefill_tokens - sum(chunk.end - chunk.start for chunk in chunks)
            if budget == 0:
                break
            prompt = self.waiting.popleft()
            prompt.pages = self.pool.take(pages_for(len(prompt.ids)))
            self.ready.append(prompt)
            expected += len(prompt.rows)
            chunks.append(self._chunk(prompt, budget))
        return chunks

    def next_starts(self) -> list[Start]:
        """Rows that begin now: their prompts are computed, and there is a seat and a page for them."""
        starts = []
        while self.ready and self.ready[0].is_computed and self._seats:
            prompt = self.ready[0]
            whole = len(prompt.ids) // PAGE
            needs_copy = len(prompt.rows) > 1 and whole < len(prompt.pages)
            if needs_copy and not self.pool.free:
                if self.running:
                    break
                # The last page cannot be had twice: the other rows wait for a prefill of their own.
                self.waiting.appendleft(Prompt(prompt.ids, deque(list(prompt.rows)[1:])))
                prompt.rows, needs_copy = deque([prompt.rows[0]]), False
            row = prompt.rows.popleft()
            row.seat, row.pages, copy = self._seats.pop(), prompt.pages, None
            if not prompt.rows:
                self.ready.popleft()
            else:
                row.pages = prompt.pages[:whole]
                self.pool.share(row.pages)
                if needs_copy:
                    row.pages = row.pages + self.pool.take(1)
                    copy = prompt.pages[whole], row.pages[whole]
            self.running.append(row)
            starts.append(Start(prompt, row, copy))
        return starts

    def next_moves(self) -> dict[int, int]:
        """Pages to be moved, from where to where, so that those in use lie side by side (see `decode_pages`)."""
        moves = self.pool.close_gaps()
        if moves:
            holders: list[Row | Prompt] = [*self.running, *self.ready]
            for holder in holders:
                holder.pages = [moves.get(page, page) for page in holder.pages]
        return moves

    def next_decode(self) -> list[Row] | None:
        """The rows that decode now, each with a page for its new token; None if a row has to give way first."""
        rows = [row for row in self.running if row.launched < row.limit]
        needing = [row for row in rows if pages_for(row.length + 1) > len(row.pages)]
        if len(needing) > self.pool.free:
            return None
        for row in needing:
            row.pages += self.pool.take(1)
        return rows

    def give_way(self) -> int | None:
        """Free pages: of a prompt that has not started, or else of the row that started last, whose seat is returned.

        To be called when all launched tokens are known.
        """
        if self.ready:
            prompt = self.ready.pop()
            self._forget(prompt)
            self.waiting.appendleft(prompt)
            return None
        row = self.running[-1]
        assert row.launched == len(row.ids)
        self.waiting.appendleft(Prompt(row.prompt + row.ids, deque([row])))
        return self._leave(row)

    def end(self, row: Row) -> int | None:
        """A row is over, wherever it is: running, waiting or ready. Returns the seat that is free now, if one is."""
        row.is_over = True
        if row in self.running:
            return self._leave(row)
        queues = self.ready, self.waiting
        queue, prompt = next((queue, prompt) for queue in queues for prompt in queue if row in prompt.rows)
        prompt.rows.remove(row)
        if not prompt.rows:
            self._forget(prompt)
            queue.remove(prompt)
        return None

    def _fits(self, prompt: Prompt) -> bool:
        """Whether there are pages for a prompt, with one more for every row that runs, so that none gives way soon."""
        return self.pool.free >= pages_for(len(prompt.ids)) + len(self.running) + len(self.ready)

    def _chunk(self, prompt: Prompt, budget: int) -> Chunk:
        start, prompt.computed = prompt.computed, min(len(prompt.ids), prompt.computed + budget)
        return Chunk(prompt, start, prompt.computed)

    def _leave(self, row: Row) -> int:
        self.running.remove(row)
        self._seats.append(row.seat)
        self.pool.release(row.pages)
        row.pages = []
        return row.seat

    def _forget(self, prompt: Prompt) -> None:
        self.pool.release(prompt.pages)
        prompt.pages, prompt.computed, prompt.hidden = [], 0, None
