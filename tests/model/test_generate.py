"""The generator: what it returns is what the training forward says of the finished text, whatever ran beside it."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import backend
from model import decoding, generate
from model.batch import IGNORE, PackedBatch
from model.config import ModelConfig
from model.decoding import Decoder, Inputs, graph_sizes
from model.errors import InputError
from model.generate import Completion, Generator, Request
from model.heads import CausalLM
from model.kv_cache import PAGE, KVCache, page_bytes
from model.sampling import SamplingOptions, TokenChooser
from model.scheduler import Chunk, Prompt, Scheduler
from tests.model.test_streaming import byte_ids, tokenizer
from tests.model.tiny import CONFIGS, LLAMA, causal_lm

TOLERANCE = 1e-5
# Room for several pages; weights wide enough for the likeliest token to stand out.
LONG = replace(LLAMA, max_position_embeddings=5 * PAGE, initializer_range=0.2)


@cache
def long_model(seed: int = 0) -> CausalLM:
    return causal_lm(LONG, seed).requires_grad_(False)


def generator(pages: int | None = None, of: CausalLM | None = None, **options: Any) -> Generator:
    """pages: of the cache, the one that belongs to nobody included."""
    of = of or long_model()
    cache_bytes = None if pages is None else pages * page_bytes(of.config, torch.float32)
    made = Generator(of.config, device="cpu", cache_bytes=cache_bytes, **options)
    made.load(of.named_parameters())
    return made


def trained_logprobs(model: CausalLM, request: Request, completion: Completion) -> Tensor:
    """Log-probabilities of an answer by the training forward, over the finished text."""
    ids = torch.tensor([*request.prompt, *completion.ids])
    targets = ids.roll(-1)
    targets[-1] = IGNORE
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    batch = PackedBatch(ids, torch.arange(len(ids)), bounds, targets, 1, model.config.rope_length)
    with torch.no_grad():
        logprobs = model(batch, request.options.temperature or 1.0).logprob
    return logprobs[len(request.prompt) - 1 : -1]


def assert_trained(model: CausalLM, requests: list[Request], completions: list[Completion]) -> None:
    """Every answer has its length, and the log-probabilities of the training forward."""
    assert [(answer.request, answer.sample) for answer in completions] == [
        (number, sample) for number, request in enumerate(requests) for sample in range(request.samples)
    ]
    for answer in completions:
        request = requests[answer.request]
        room = model.config.rope_length - len(request.prompt)
        assert len(answer.ids) == min(request.options.max_new_tokens, room) and answer.end_reason == "length"
        expected = trained_logprobs(model, request, answer)
        assert (torch.tensor(answer.logprobs) - expected).abs().max() <= TOLERANCE


def ragged_requests(count: int, longest: int = 40, answer: int = 23, seed: int = 0) -> list[Request]:
    """Greedy and sampled in turn, one to three samples."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [
        Request(
            torch.randint(0, LLAMA.vocab_size, (length,), generator=draw).tolist(),
            SamplingOptions(temperature=0.7 if i % 2 else 0.0, max_new_tokens=3 + 5 * i % answer),
            samples=1 + i % 3,
            seed=i,
        )
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logprobs_are_those_of_the_training_forward_past_refills(config: ModelConfig) -> None:
    model = causal_lm(replace(config, initializer_range=0.1))
    requests = ragged_requests(12)
    assert_trained(model, requests, generator(of=model, max_rows=5).generate(requests))


def test_logprobs_are_those_of_the_training_forward_after_giving_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seats = []
    give_way = Scheduler.give_way
    monkeypatch.setattr(Scheduler, "give_way", lambda self: seats.append(give_way(self)) or seats[-1])
    requests = ragged_requests(9, longest=100, answer=140)
    answers = generator(pages=6, max_rows=8).generate(requests)
    assert len([seat for seat in seats if seat is not None]) >= 3
    assert_trained(long_model(), requests, answers)
    ample = generator(max_rows=8).generate(requests)
    assert [answer.ids for answer in answers] == [answer.ids for answer in ample]


def test_a_window_that_leaves_pages_behind_is_the_training_forward_s() -> None:
    config = replace(LONG, model_type="mistral", sliding_window=PAGE + 3)
    model = causal_lm(config)
    requests = ragged_requests(4, longest=180, answer=137, seed=1)
    assert_trained(model, requests, generator(of=model, max_rows=8).generate(requests))


def test_a_long_prompt_is_prefilled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[Chunk] = []
    prefill = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self, given: (chunks.extend(given), prefill(self, given))[1])
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 50)
    requests = ragged_requests(6, longest=200, seed=4)
    answers = generator(max_rows=3).generate(requests)
    assert len(chunks) >= 2 * len(requests) and max(chunk.end - chunk.start for chunk in chunks) == 50
    assert sum(chunk.end - chunk.start for chunk in chunks) == sum(len(request.prompt) for request in requests)
    assert_trained(long_model(), requests, answers)


@pytest.mark.parametrize("is_late", [False, True])
def test_rows_that_fill_up_a_graph_s_number_change_nothing(is_late: bool) -> None:
    """What a GPU does, run as it is: fixed numbers of rows, full tables, tokens read a step late."""
    requests = ragged_requests(9, longest=100, answer=90)
    plain = generator(max_rows=7).generate(requests)
    made = generator(max_rows=7)
    made._decoder.sizes, made._is_late = graph_sizes(7), is_late
    answers = made.generate(requests)
    assert [answer.ids for answer in answers] == [answer.ids for answer in plain]
    assert_trained(long_model(), requests, answers)


@pytest.mark.parametrize("face", ["triton", "reference"])
def test_other_faces_read_the_cache_as_it_lies(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a GPU, interpreted, with pages full of NaN where nothing was written."""
    if face == "triton" and torch.cuda.is_available():
        pytest.skip("compiled kernels take no tensors of a processor")
    requests = [greedy(list(range(3, 3 + length)), 3) for length in (PAGE + 5, PAGE - 1)]
    expected = generator().generate(requests)
    monkeypatch.setattr(backend, "FACE", face)
    made = generator()
    made.cache.data.fill_(float("nan"))
    answers = made.generate(requests)
    monkeypatch.undo()
    assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
    assert_trained(long_model(), requests, answers)


@pytest.mark.parametrize(
    ("max_rows", "sizes"), [(1, [1]), (7, [1, 2, 4, 7]), (64, [1, 2, 4, 8, 16, 32, 48, 64]), (20, [1, 2, 4, 8, 16, 20])]
)
def test_graphs_are_few_and_cover_all_rows(max_rows: int, sizes: list[int]) -> None:
    assert graph_sizes(max_rows) == sizes


def test_double_precision_is_double() -> None:
    model = causal_lm(LONG).double()
    made = Generator(LONG, device="cpu", dtype=torch.float64, max_rows=3)
    made.load(model.named_parameters())
    requests = ragged_requests(4)
    for answer in made.generate(requests):
        expected = trained_logprobs(model, requests[answer.request], answer)
        assert (torch.tensor(answer.logprobs, dtype=torch.float64) - expected).abs().max() <= 1e-12


def greedy(prompt: list[int], tokens: int, **options: Any) -> Request:
    return Request(prompt, SamplingOptions(temperature=0.0, max_new_tokens=tokens, **options))


def test_an_answer_ends_with_its_stop_token() -> None:
    made = generator()
    [free] = made.generate([greedy([5, 6, 7], 20)])
    stop = free.ids[11]
    [stopped] = made.generate([greedy([5, 6, 7], 20, stop_ids=(130, stop))])
    length = free.ids.index(stop) + 1
    assert stopped.ids == free.ids[:length] and stopped.end_reason == "stop"
    assert stopped.logprobs == free.logprobs[:length]


def test_an_answer_ends_with_the_context() -> None:
    [answer] = generator().generate([greedy([1] * (5 * PAGE - 3), 20)])
    assert len(answer.ids) == 3 and answer.end_reason == "length"


def test_text_comes_without_what_ended_it() -> None:
    of = tokenizer("llama")
    config = replace(LONG, vocab_size=of.padded_vocab_size)
    model = causal_lm(config)
    made = generator(of=model, tokenizer=of, max_rows=2)
    prompt = of.encode("血压偏高的病人")
    [free] = made.generate([greedy(prompt, 40)])
    assert free.text == of.decode(free.ids, skip_special=True)
    [by_id] = made.generate([greedy(prompt, 40, stop_ids=(free.ids[20],))])
    assert by_id.end_reason == "stop" and by_id.text == of.decode(by_id.ids[:-1], skip_special=True)
    stop = free.text[8:10]
    [by_text] = made.generate([greedy(prompt, 40, stop_texts=(stop,))])
    assert by_text.end_reason == "stop" and by_text.text == free.text[: free.text.index(stop)]
    events = list(made.stream([greedy(prompt, 40, stop_texts=(stop,))]))
    assert "".join(event.text for event in events) == by_text.text
    assert [event.end_reason for event in events] == [None] * (len(events) - 1) + ["stop"]


def test_a_stop_text_whose_last_character_was_held_back_to_the_limit_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    of = tokenizer("llama")
    given = iter(byte_ids("llama", "吉".encode()))
    monkeypatch.setattr(TokenChooser, "choose", lambda *_: (torch.tensor([next(given)]), torch.zeros(1)))
    made = generator(of=causal_lm(replace(LONG, vocab_size=of.padded_vocab_size)), tokenizer=of)
    [answer] = made.generate([greedy([1], 3, stop_texts=("吉",))])
    assert (answer.text, answer.end_reason, len(answer.ids)) == ("", "stop", 3)


def pages_are_back(made: Generator) -> bool:
    return made.is_idle and made._scheduler.pool.free == made.cache.data.shape[2] - 1


@pytest.mark.parametrize("is_late", [False, True])
def test_a_cancelled_request_says_no_more_and_disturbs_nobody(is_late: bool) -> None:
    requests = ragged_requests(5, answer=40)
    made = generator(max_rows=3)
    expected = [answer.ids for answer in made.generate(requests) if answer.request != 1]
    made._is_late = is_late
    numbers = [made.add(request) for request in requests]
    events = [event for _ in range(4) for event in made.step()]
    made.cancel(numbers[1])
    after = []
    while not made.is_idle:
        after += made.step()
    assert numbers[1] not in {event.request for event in after}
    kept = [event for event in events + after if event.request != numbers[1]]
    keys = sorted({(event.request, event.sample) for event in kept})
    assert [[event.id for event in kept if (event.request, event.sample) == key] for key in keys] == expected
    assert pages_are_back(made)


def test_after_the_last_request_is_cancelled_others_are_answered_at_once() -> None:
    requests = ragged_requests(3, answer=20)
    expected = generator(max_rows=3).generate(requests)
    made = generator(max_rows=3)
    made._is_late = True
    number = made.add(requests[0])
    made.step()
    made.cancel(number)
    assert pages_are_back(made)
    assert made.generate(requests) == expected


def test_a_single_sample_can_be_cancelled() -> None:
    made = generator()
    number = made.add(Request([1, 2], SamplingOptions(max_new_tokens=5), samples=3))
    made.cancel(number, 1)
    samples = set()
    while not made.is_idle:
        samples |= {event.sample for event in made.step()}
    assert samples == {0, 2}


def test_closing_a_stream_cancels_what_is_not_done() -> None:
    made = generator(max_rows=2)
    stream: Iterator[generate.Event] = made.stream(ragged_requests(6))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert pages_are_back(made)
    requests = ragged_requests(3)
    assert_trained(long_model(), requests, made.generate(requests))


def test_cache_bytes_are_kept_to_the_page() -> None:
    one = page_bytes(LONG, torch.float32)
    assert one == 2 * LONG.num_layers * PAGE * LONG.num_kv_heads * LONG.head_dim * 4
    made = Generator(LONG, device="cpu", cache_bytes=9 * one + one - 1)
    assert made.cache.data.nbytes == 9 * one
    # No more than can be used: two rows of five pages, and the page that belongs to nobody.
    assert Generator(LONG, device="cpu", max_rows=2).cache.data.shape[2] == 11


def test_pages_on_their_way_take_the_memory_of_one_layer() -> None:
    made = generator(pages=9)
    data, targets = made.cache.data, torch.tensor([5, 6, 7, 8])
    data.normal_(generator=torch.Generator().manual_seed(0))
    expected = data.clone()
    expected[:, :, targets] = data[:, :, targets - 4]
    sizes = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            if op is torch.ops.aten.index.Tensor:
                sizes.append(result.nbytes)
            return result

    with Watched():
        made.cache.copy_pages(targets - 4, targets)
    assert max(sizes) * LONG.num_layers == len(targets) * page_bytes(LONG, torch.float32)
    assert torch.equal(made.cache.data, expected)


def test_a_cache_that_cannot_hold_one_sequence_is_refused() -> None:
    one = page_bytes(LONG, torch.float32)
    with pytest.raises(InputError, match=f"holds {4 * PAGE} tokens.*context is {5 * PAGE}.*at least {6 * one} bytes"):
        Generator(LONG, device="cpu", cache_bytes=5 * one)
    made = Generator(LONG, device="cpu", cache_bytes=5 * one, context=4 * PAGE)
    assert made.context == 4 * PAGE


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "prompt is empty"),
        (Request([1] * 5 * PAGE), f"has {5 * PAGE} tokens; a context of {5 * PAGE} leaves room for at most"),
        (Request([1, 131]), "ids from 1 to 131; the model knows 0 to 130"),
        (Request([-1]), "ids from -1 to -1"),
        (Request([1], samples=0), "samples is 0"),
        (Request([1], SamplingOptions(stop_texts=("。",))), "stop_texts need a tokenizer"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(request_: Request, message: str) -> None:
    made = generator()
    with pytest.raises(InputError, match=message):
        made.generate([greedy([1], 3), request_])
    assert pages_are_back(made)


def test_a_request_whose_text_cannot_be_streamed_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generator(tokenizer=tokenizer("llama"))
    monkeypatch.setattr(generate, "TextStream", MagicMock(side_effect=InputError("another decoder")))
    with pytest.raises(InputError, match="another decoder"):
        made.add(greedy([1], 3))
    assert made.is_idle and not made._live


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "max_rows is 0. Use at least 1."),
        ({"context": 1}, "A context of 1 tokens holds no"),
        ({"context": 0}, "A context of 0 tokens holds no"),
        ({"context": -5}, "A context of -5 tokens holds no"),
    ],
)
def test_a_generator_that_could_answer_nobody_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Generator(LONG, device="cpu", **options)


def test_a_gpu_that_is_not_the_current_one_is_captured_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one's stream would record nothing, and an event on it would be there before the tokens are."""
    decoder, ours = generator(max_rows=2)._decoder, torch.device("cuda", 1)
    cuda = MagicMock()
    monkeypatch.setattr(decoding, "capture_stream", cache(decoding.capture_stream.__wrapped__))
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: torch.zeros(shape, dtype=dtype))
    decoder.device = ours
    with torch.inference_mode():
        decoder._capture(2)
    cuda.Stream.assert_called_once_with(ours)
    assert cuda.graph.call_args.kwargs["stream"] is cuda.Stream.return_value
    cuda.current_stream.reset_mock()
    decoder._result([], torch.zeros(0), torch.zeros(0))
    cuda.current_stream.assert_called_once_with(ours)
    cuda.Event.return_value.record.assert_called_once_with(cuda.current_stream.return_value)


def test_nobody_sorts_the_places_of_keys_where_training_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU `index_copy_` does so when it is told to be deterministic. What is said of all else stays said."""
    said: list[bool] = []
    write = KVCache.write

    def watched(*arguments: Any) -> None:
        said.append(torch.are_deterministic_algorithms_enabled())
        write(*arguments)

    monkeypatch.setattr(KVCache, "write", watched)
    decoder = generator(max_rows=2)._decoder
    shapes = (1,), (1,), (1, 5)
    monkeypatch.setattr(
        decoder,
        "_capture",
        lambda size: (MagicMock(), *decoder._step(*(torch.zeros(shape, dtype=torch.int32) for shape in shapes))),
    )
    prompt = Prompt([1, 2, 3], deque())
    prompt.pages = [1]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.inference_mode():
            decoder.prefill([Chunk(prompt, 0, 3)])
            decoder._replay(1, Inputs(2, 5, "cpu"))
        assert len(said) == 2 * LONG.num_layers and not any(said)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_all_graphs_of_a_gpu_are_captured_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of several streams share no memory, and cuBLAS would keep a workspace for the stream of each."""
    decoders, cuda = [generator(max_rows=2)._decoder for _ in range(2)], MagicMock()
    monkeypatch.setattr(decoding, "capture_stream", cache(decoding.capture_stream.__wrapped__))
    cuda.Stream.side_effect = lambda device: MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    with torch.inference_mode():
        for decoder in decoders:
            decoder.device = torch.device("cuda", 0)
            decoder._capture(1)
            decoder._capture(2)
    assert len({call.kwargs["stream"] for call in cuda.graph.call_args_list}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_replace_the_old_ones(dtype: torch.dtype) -> None:
    other = long_model(seed=1)
    made = Generator(LONG, device="cpu", dtype=dtype)
    requests = [greedy([1, 2, 3], 30)]
    fresh = Generator(LONG, device="cpu", dtype=dtype)
    fresh.load(other.named_parameters())
    made.load(long_model().named_parameters())
    places = {
        name: parameter.data_ptr() for name, parameter in made.model.named_parameters() if not parameter.is_mkldnn
    }
    before = made.generate(requests)
    made.load(reversed(list(other.named_parameters())))
    after = made.generate(requests)
    assert after == fresh.generate(requests) != before
    # In place, but for the matrices that a CPU lays out anew.
    named = dict(made.model.named_parameters())
    assert all(named[name].data_ptr() == place for name, place in places.items())
    assert len(places) == (len(named) if dtype == torch.bfloat16 else 2 * LONG.num_layers + 2)


def test_nothing_is_left_of_broken_weights() -> None:
    made = generator()
    requests = [greedy([1, 2, 3], 5)]
    expected = made.generate(requests)
    made.load((name, torch.full_like(x, float("nan"))) for name, x in long_model().named_parameters())
    assert made.generate(requests)[0].ids == [0] * 5
    made.load(long_model().named_parameters())
    assert made.generate(requests) == expected


def test_weights_that_do_not_fit_are_refused() -> None:
    made = Generator(LONG, device="cpu")
    tensors = dict(long_model().named_parameters())
    with pytest.raises(InputError, match=r"lm_head\.weight, model\.norm\.weight missing"):
        made.load((name, x) for name, x in tensors.items() if name not in ("lm_head.weight", "model.norm.weight"))
    with pytest.raises(InputError, match=r"score\.weight is not a parameter"):
        made.load([*tensors.items(), ("score.weight", torch.zeros(1))])
    with pytest.raises(InputError, match=r"model\.norm\.weight is given twice"):
        made.load([*tensors.items(), ("model.norm.weight", tensors["model.norm.weight"])])
    with pytest.raises(InputError, match=r"model\.norm\.weight is \[3\], but this model needs \[48\]"):
        made.load([("model.norm.weight", torch.zeros(3))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_memory_is_free_and_the_next_weights_take_it_anew(dtype: torch.dtype) -> None:
    made = generator(dtype=dtype)
    requests = ragged_requests(5)
    before = made.generate(requests)
    held = [weakref.ref(tensor) for tensor in (*made.model.parameters(), made.cache.data, made._decoder._latest)]
    made.release()
    made.release()  # again, nothing happens
    gc.collect()
    assert made.is_released and all(ref() is None for ref in held)
    with pytest.raises(AssertionError, match="load"):
        made.add(requests[0])
    made.load(long_model().named_parameters())
    assert not made.is_released and made.generate(requests) == before
    with pytest.raises(AssertionError, match="while requests are running"):
        made.add(requests[0])
        made.release()


def test_samples_of_a_request_may_be_drawn_apart() -> None:
    made, request = generator(), Request([5, 9, 2], SamplingOptions(max_new_tokens=20), samples=5, seed=3)
    together = made.generate([request])
    apart = made.generate([replace(request, samples=2, first_sample=3), replace(request, samples=3)])
    assert [one.sample for one in apart] == [3, 4, 0, 1, 2]
    assert [one.ids for one in apart] == [one.ids for one in (*together[3:], *together[:3])]


def test_it_scores_with_the_same_weights() -> None:
    request = ragged_requests(1)[0]
    made = generator()
    [answer] = made.generate([greedy(list(request.prompt), 12)])
    [[scores]] = made.score([request.prompt], [[answer.ids]])
    assert scores == pytest.approx(answer.logprobs, abs=TOLERANCE)


def test_it_opens_a_directory(tmp_path: Path) -> None:
    from tests.small_base import write_small_base

    directory = write_small_base(tmp_path / "base")
    made = Generator.from_directory(directory, device="cpu")
    assert made.tokenizer is not None
    prompt = made.tokenizer.encode("患者因头晕")
    [answer] = made.generate([greedy(prompt, 8)])
    assert answer.text == made.tokenizer.decode(answer.ids, skip_special=True)
