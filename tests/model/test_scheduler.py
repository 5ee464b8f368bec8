"""The scheduler without a model: whatever comes, rows and pages are never given twice, and everybody ends."""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import given, settings
from hypothesis import strategies as st

from model.kv_cache import PAGE, PagePool, pages_for
from model.sampling import SamplingOptions
from model.scheduler import Chunk, Prompt, Row, Scheduler

OPTIONS = SamplingOptions()


def prompt(request: int, length: int, answers: list[int]) -> Prompt:
    """A prompt whose rows end after so many tokens."""
    rows = [Row(request, sample, [0] * length, OPTIONS, 0, limit) for sample, limit in enumerate(answers)]
    return Prompt([0] * length, deque(rows))


class Machine:
    """Does what the plans say, and keeps account of what is in each page: of which row, or prompt, which token."""

    def __init__(self, pages: int, max_rows: int, prefill_tokens: int) -> None:
        self.scheduler = Scheduler(pages, max_rows, prefill_tokens)
        self.max_rows = max_rows
        self.content: dict[int, list[tuple[int, int]]] = {}  # of a page: (request, position) by row
        self.prefilled: Counter[int] = Counter()
        self.gave_way = 0
        self.done: list[Row] = []

    def write(self, pages: list[int], request: int, position: int) -> None:
        page = self.content.setdefault(pages[position // PAGE], [])
        page[position % PAGE :] = [(request, position)]

    def check(self, pages: list[int], request: int, length: int) -> None:
        held = [self.content[page] for page in pages[: pages_for(length)]]
        tokens = [token for page in held for token in page][:length]
        assert tokens == [(request, position) for position in range(length)]

    def step(self) -> list[Chunk]:
        scheduler = self.scheduler
        chunks = scheduler.next_prefill()
        assert sum(chunk.end - chunk.start for chunk in chunks) <= scheduler.prefill_tokens
        for chunk in chunks:
            request = chunk.prompt.rows[0].request
            self.prefilled[request] += chunk.end - chunk.start
            for position in range(chunk.start, chunk.end):
                self.write(chunk.prompt.pages, request, position)
        for start in scheduler.next_starts():
            if start.copy is not None:
                self.content[start.copy[1]] = list(self.content[start.copy[0]])
            self.check(start.row.pages, start.row.request, len(start.prompt.ids))
            self.take(start.row)
        while (rows := scheduler.next_decode()) is None:
            self.gave_way += scheduler.give_way() is not None
        moves = scheduler.next_moves()
        self.content |= {target: list(self.content.get(source, [])) for source, target in moves.items()}
        assert len({row.seat for row in scheduler.running}) == len(scheduler.running) <= self.max_rows
        for row in rows:
            self.write(row.pages, row.request, row.length)
        for row in rows:
            self.take(row)
        return chunks

    def take(self, row: Row) -> None:
        row.launched += 1
        row.ids.append(0)
        if len(row.ids) == row.limit:
            self.check(row.pages, row.request, row.length)  # nobody wrote over its tokens
            self.scheduler.end(row)
            self.done.append(row)

    def run(self, prompts: list[Prompt], most: int = 20_000) -> None:
        for each in prompts:
            self.scheduler.add(each)
        for _ in range(most):
            if self.scheduler.is_idle:
                return
            self.step()
        raise AssertionError("somebody never ends")


LONGEST = 3 * PAGE
requests = st.tuples(st.integers(1, 2 * PAGE + 5), st.lists(st.integers(1, PAGE - 5), min_size=1, max_size=5))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=12),
    st.integers(1 + pages_for(LONGEST), 20),
    st.integers(1, 6),
    st.sampled_from([7, PAGE, 1000]),
)
def test_everybody_ends_and_all_pages_come_back(
    asked: list[tuple[int, list[int]]], pages: int, max_rows: int, prefill_tokens: int
) -> None:
    machine = Machine(pages, max_rows, prefill_tokens)
    machine.run([prompt(number, length, answers) for number, (length, answers) in enumerate(asked)])
    assert Counter(row.request for row in machine.done) == {n: len(answers) for n, (_, answers) in enumerate(asked)}
    assert machine.scheduler.pool.free == pages - 1


def test_samples_share_one_prefill_even_when_they_do_not_fit_at_once() -> None:
    machine = Machine(pages=60, max_rows=3, prefill_tokens=1000)
    machine.run([prompt(0, PAGE + 9, [20 + sample for sample in range(8)])])
    assert machine.prefilled == {0: PAGE + 9}


def test_samples_that_cannot_have_a_last_page_each_go_one_by_one() -> None:
    """Three pages are all there are, and the prompt alone takes them."""
    machine = Machine(pages=4, max_rows=3, prefill_tokens=1000)
    machine.run([prompt(0, 2 * PAGE + 5, [9, 9, 9])])
    assert sorted(row.sample for row in machine.done) == [0, 1, 2]
    assert machine.prefilled == {0: 3 * (2 * PAGE + 5)}


def test_prompts_wait_for_a_place_before_they_take_pages() -> None:
    machine = Machine(pages=60, max_rows=2, prefill_tokens=1000)
    for number in range(3):
        machine.scheduler.add(prompt(number, 5, [9]))
    assert len(machine.step()) == 2 and machine.scheduler.pool.free == 59 - 2


def test_full_pages_of_a_prompt_are_held_once() -> None:
    machine = Machine(pages=60, max_rows=8, prefill_tokens=1000)
    machine.scheduler.add(prompt(0, 4 * PAGE + 1, [5] * 8))
    machine.step()
    assert len({page for row in machine.scheduler.running for page in row.pages}) == 4 + 8


def test_a_place_is_taken_in_the_step_after_its_row_ended() -> None:
    machine = Machine(pages=60, max_rows=2, prefill_tokens=1000)
    for number, answer in enumerate([9, 3, 9]):
        machine.scheduler.add(prompt(number, 5, [answer]))
    machine.step()  # the first token comes of the prefill, the second of this step
    machine.step()
    assert [row.request for row in machine.done] == [1]
    machine.step()
    assert [row.request for row in machine.scheduler.running] == [0, 2]


def test_rows_decode_while_a_long_prompt_is_prefilled_chunk_by_chunk() -> None:
    machine = Machine(pages=60, max_rows=2, prefill_tokens=100)
    machine.scheduler.add(prompt(0, 5, [60]))
    machine.step()
    [row] = machine.scheduler.running
    machine.scheduler.add(prompt(1, 350, [3]))
    for ends in (100, 200, 300, 350):
        before = len(row.ids)
        [chunk] = machine.step()
        assert chunk.end == ends and len(row.ids) == before + 1


def test_short_prompts_are_prefilled_together() -> None:
    machine = Machine(pages=60, max_rows=8, prefill_tokens=100)
    for number in range(8):
        machine.scheduler.add(prompt(number, 30, [3]))
    assert [sum(chunk.end - chunk.start for chunk in machine.step()) for _ in range(4)] == [100, 100, 40, 0]


def test_the_row_that_started_last_gives_way_and_goes_on_with_what_it_has() -> None:
    machine = Machine(pages=5, max_rows=2, prefill_tokens=1000)
    machine.run([prompt(0, PAGE, [2 * PAGE]), prompt(1, PAGE, [2 * PAGE])])
    assert machine.gave_way == 1
    assert [row.request for row in machine.done] == [0, 1]
    # Three pages each: the last of the four is the first row's, so the second leaves with a page of answer or less.
    assert PAGE < machine.prefilled[1] - PAGE <= 2 * PAGE + 1


def test_a_cancelled_row_leaves_nothing_wherever_it_is() -> None:
    for steps in range(4):
        machine = Machine(pages=20, max_rows=1, prefill_tokens=40)
        running, waiting = prompt(0, 2 * PAGE, [9, 9]), prompt(1, 5, [9])
        rows = [*running.rows, *waiting.rows]
        for each in (running, waiting):
            machine.scheduler.add(each)
        for _ in range(steps):
            machine.step()
        for row in rows:
            machine.scheduler.end(row)
        assert machine.scheduler.is_idle and machine.scheduler.pool.free == 19


def test_gaps_are_closed_with_the_fewest_moves() -> None:
    pool = PagePool(10)
    pages = pool.take(8)
    pool.share([8])
    pool.release([2, 3, 5])
    assert pool.close_gaps() == {8: 2, 7: 3, 6: 5}
    assert pool.close_gaps() == {} and pool.free == 4
    assert pool.take(1) == [6] and pages == list(range(1, 9))
    pool.release([2])
    assert pool.free == 3  # it moved with both of its holders
