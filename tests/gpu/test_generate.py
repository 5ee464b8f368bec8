"""Generation on a GPU: graphs change nothing, new weights reach them, and the host waits for tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.batch import IGNORE, PackedBatch
from model.decoding import Decoder, Inputs
from model.generate import Completion, Generator, Request
from model.heads import CausalLM
from model.kv_cache import PAGE, page_bytes
from model.sampling import SamplingOptions
from model.scheduler import Scheduler
from tests.model.tiny import LLAMA, causal_lm

pytestmark = pytest.mark.gpu

CONFIG = replace(LLAMA, max_position_embeddings=8 * PAGE, initializer_range=0.2, head_dim=64)


def model(seed: int = 0) -> CausalLM:
    return causal_lm(CONFIG, seed).requires_grad_(False)


def generator(dtype: torch.dtype = torch.float32, pages: int | None = None, max_rows: int = 20) -> Generator:
    cache_bytes = None if pages is None else pages * page_bytes(CONFIG, dtype)
    made = Generator(CONFIG, device="cuda", dtype=dtype, max_rows=max_rows, cache_bytes=cache_bytes)
    made.load(model().named_parameters())
    return made


KINDS = [
    SamplingOptions(temperature=0.0),
    SamplingOptions(temperature=0.7),
    SamplingOptions(top_k=5),
    SamplingOptions(top_p=0.9, repetition_penalty=1.2),
    SamplingOptions(min_p=0.1),
]


def mixed(kinds: Sequence[SamplingOptions] = KINDS, count: int = 30) -> list[Request]:
    draw = torch.Generator().manual_seed(0)
    return [
        Request(
            torch.randint(0, CONFIG.vocab_size, (1 + 53 * at % 200,), generator=draw).tolist(),
            replace(kinds[at % len(kinds)], max_new_tokens=10 + 29 * at % 150, stop_ids=(at,)),
            samples=1 + at % 2,
            seed=at,
        )
        for at in range(count)
    ]


@contextmanager
def without_graphs() -> Iterator[None]:
    """The same step, launched kernel by kernel."""

    def eager(self: Decoder, size: int, host: Inputs) -> tuple[Tensor, Tensor]:
        inputs = self._inputs
        inputs.block.copy_(host.block, non_blocking=True)
        return self._step(inputs.seats[:size], inputs.positions[:size], inputs.tables[:size])

    with patch.object(Decoder, "_replay", eager):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_what_kernels_give_bitwise(dtype: torch.dtype) -> None:
    requests = mixed()
    with without_graphs():
        expected = generator(dtype).generate(requests)
    made = generator(dtype)
    assert made.generate(requests) == expected
    assert made.generate(requests) == expected  # all graphs are there by now
    assert len(made._decoder._graphs) > 3


def trained_logprobs(of: CausalLM, request: Request, answer: Completion) -> Tensor:
    ids = torch.tensor([*request.prompt, *answer.ids], device="cuda")
    targets = ids.roll(-1)
    targets[-1] = IGNORE
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32, device="cuda")
    positions = torch.arange(len(ids), device="cuda")
    batch = PackedBatch(ids, positions, bounds, targets, 1, CONFIG.rope_length)
    with torch.no_grad():
        return of(batch, request.options.temperature or 1.0).logprob[len(request.prompt) - 1 : -1]


@pytest.mark.parametrize("pages", [None, 1 + 12])
def test_logprobs_are_those_of_the_training_forward(pages: int | None) -> None:
    """Past refills, and with few pages past giving way too."""
    gone = []
    give_way = Scheduler.give_way
    of, requests = model().cuda(), mixed()
    with patch.object(Scheduler, "give_way", lambda self: gone.append(give_way(self)) or gone[-1]):
        answers = generator(pages=pages).generate(requests)
    assert bool(gone) == (pages is not None)
    for answer in answers:
        expected = trained_logprobs(of, requests[answer.request], answer)
        assert (torch.tensor(answer.logprobs) - expected.cpu()).abs().max() <= 1e-5


def test_new_weights_reach_captured_graphs() -> None:
    made, requests = generator(), mixed()
    before = made.generate(requests)
    graphs = dict(made._decoder._graphs)
    places = [parameter.data_ptr() for parameter in made.model.parameters()]
    made.load(model(seed=1).named_parameters())
    after = made.generate(requests)
    fresh = generator()
    fresh.load(model(seed=1).named_parameters())
    assert after == fresh.generate(requests) != before
    assert places == [parameter.data_ptr() for parameter in made.model.parameters()]
    assert all(made._decoder._graphs[key] is graph for key, graph in graphs.items())


def test_the_host_waits_for_tokens_alone() -> None:
    """Nothing in a step synchronises but the events that tokens arrive by."""
    made, requests = generator(), mixed()
    expected = made.generate(requests)  # graphs are captured, kernels compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert made.generate(requests) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_cache_takes_what_it_was_given() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    made = Generator(CONFIG, device="cuda", dtype=torch.bfloat16, cache_bytes=40 << 20, max_rows=4096)
    taken = torch.cuda.memory_allocated() - before
    assert made.cache.data.nbytes <= 40 << 20 < made.cache.data.nbytes + page_bytes(CONFIG, torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in made.model.parameters())
    assert taken - made.cache.data.nbytes - weights < 8 << 20  # rotary tables, and numbers of rows
