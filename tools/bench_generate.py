"""Race the generator against transformers' generate, on this machine.

    python tools/bench_generate.py                                       # make bench-generate
    python tools/bench_generate.py --out docs/benchmarks/generate-cpu    # and keep the result

Both answer the same ragged prompts greedily with the same weights and threads, in turns. A request says how long its
answer is; ours batches continuously, the peer pads prompts on the left, sorted by length, and a row of its batch that
has all its tokens may stop. It runs at the batch size and with the kind of cache at which it is fastest. Answers are
compared: where they differ first, the peer's two likeliest tokens must be a near-tie.

On a GPU the model has the shape of a 7B one, in bf16, and decoding is also measured against copy bandwidth: bytes of
weights and cache that a step has to read, over the time it takes and the bandwidth of large copies.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.benchmark import Lap, fastest, now, race, speeds_by_size
from engine.launch import run, speak
from kernels.bench.ceilings import measure_ceilings
from kernels.bench.clock import CudaClock
from model.config import ModelConfig, parameter_shapes
from model.errors import InputError
from model.generate import Completion, Generator, Request
from model.hf import read_model
from model.kv_cache import PAGE, page_bytes
from model.sampling import SamplingOptions
from tools.racing import (
    NEAR_TIE,
    OURS,
    RaceConfig,
    keep,
    require_shape,
    shape_of,
    tokens_a_second,
    write_lively_model,
)

PEER = "transformers"


@dataclass
class Load:
    """What is asked: prompts of random tokens, and how long the answers are."""

    requests: int = 64
    """prompts"""
    median_prompt: int = 96
    """of prompts in tokens, whose lengths are lognormal: half are shorter"""
    median_answer: int = 96
    """of answers in tokens, lognormal too; every request has its own"""
    spread: float = 0.8
    """standard deviation of the logarithm of lengths"""
    longest: int = 480
    """prompts and answers are clipped to 8 and this"""
    seed: int = 0
    """of lengths, prompts and weights"""

    def draw(self, vocab_size: int) -> list[Request]:
        random = np.random.default_rng(self.seed)
        lengths = [
            np.clip(random.lognormal(np.log(median), self.spread, self.requests), 8, self.longest).astype(int).tolist()
            for median in (self.median_prompt, self.median_answer)
        ]
        return [
            Request(
                random.integers(0, vocab_size, prompt).tolist(), SamplingOptions(temperature=0.0, max_new_tokens=answer)
            )
            for prompt, answer in zip(*lengths, strict=True)
        ]


@dataclass
class BenchConfig(RaceConfig):
    """Tokens a second of generation, against transformers."""

    model: str | None = None
    """a preset, or `small`: width 512, 8 blocks; by default `small` on a CPU and `7b` on a GPU"""
    rounds: int = 3
    """times that each answers all prompts, in turn"""
    peer_batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    """prompts of one call of the peer, ascending: the fastest races"""
    peer_caches: list[str] = field(default_factory=lambda: ["dynamic", "static"])
    """the peer's kinds of cache, tried at its best batch size: the fastest races"""
    load: Load = field(default_factory=Load)

    def check(self) -> None:
        super().check()
        require_shape(self.model)
        if not self.peer_batch_sizes or min(self.peer_batch_sizes) < 1 or not self.peer_caches:
            raise InputError("--peer_batch_sizes and --peer_caches need at least one entry, and sizes of at least 1.")

    def shape(self, device: torch.device) -> ModelConfig:
        name, shape = shape_of(self.model, device, "7b")
        if 2 * self.load.longest > shape.max_position_embeddings:
            limit = shape.max_position_embeddings
            raise InputError(f"--load.longest {self.load.longest}, twice, exceeds the context of {name}, {limit}.")
        return shape


class Ours:
    def __init__(self, directory: Path, config: ModelConfig, requests: list[Request], device: torch.device) -> None:
        self.generator = Generator(config, device=device, max_rows=64)
        self.generator.load(read_model(directory, config))
        self._requests, self._device = requests, device
        self.answers: list[Completion] = []

    def step(self) -> Lap:
        begin = now(self._device)
        self.answers = self.generator.generate(self._requests)
        return Lap(sum(len(answer.ids) for answer in self.answers), now(self._device) - begin)


class Peer:
    """What one would write with transformers: sort, pad on the left, generate batch by batch."""

    def __init__(self, directory: Path, requests: list[Request], device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(device).eval()
        self._requests, self._device = requests, device
        self.batch_size, self.cache = 1, "dynamic"
        self.answers: list[list[int]] = []

    @torch.inference_mode()
    def step(self) -> Lap:
        begin = now(self._device)
        order = sorted(range(len(self._requests)), key=lambda at: len(self._requests[at].prompt))
        answers: dict[int, list[int]] = {}
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            answers |= dict(zip(batch, self._generate([self._requests[at] for at in batch]), strict=True))
        self.answers = [answers[at] for at in range(len(order))]
        return Lap(sum(map(len, self.answers)), now(self._device) - begin)

    def _generate(self, requests: list[Request]) -> list[list[int]]:
        width = max(len(request.prompt) for request in requests)
        limits = [request.options.max_new_tokens for request in requests]
        ids = torch.tensor([[0] * (width - len(request.prompt)) + list(request.prompt) for request in requests])
        mask = torch.tensor([[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in requests])
        ends = (width + torch.tensor(limits)).to(self._device)

        def has_ended(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return ids.shape[1] >= ends

        out = self.model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            do_sample=False,
            use_cache=True,
            cache_implementation=None if self.cache == "dynamic" else self.cache,
            max_new_tokens=max(limits),
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([has_ended]),
        )
        return [row[width : width + limit].tolist() for row, limit in zip(out, limits, strict=True)]

    def find_settings(self, sizes: list[int], caches: list[str]) -> dict[str, float]:
        """Take the fastest batch size, then the fastest cache; returns the speeds."""
        self.cache = caches[0]

        def speed(size: int) -> float:
            self.batch_size = size
            return self.step().speed

        by_size = speeds_by_size(sizes, speed)
        self.batch_size = fastest(by_size)
        by_cache = {caches[0]: by_size[self.batch_size]}
        for self.cache in caches[1:]:
            self.step()  # a static cache is compiled for on a GPU
            by_cache[self.cache] = self.step().speed
        self.cache = fastest(by_cache)
        return {**{f"{caches[0]} {size}": speed for size, speed in by_size.items()}, **by_cache}


@torch.inference_mode()
def count_equal(ours: Ours, peer: Peer, requests: list[Request]) -> tuple[int, int]:
    """(answers that are equal, answers that part at a near-tie of the peer's logits)."""
    equal, tied = 0, 0
    for request, ours_of, theirs in zip(requests, ours.answers, peer.answers, strict=True):
        parted = next((at for at, pair in enumerate(zip(ours_of.ids, theirs, strict=True)) if pair[0] != pair[1]), None)
        equal += parted is None
        if parted is not None:
            ids = torch.tensor([[*request.prompt, *theirs[:parted]]], device=peer.model.device)
            logits = peer.model(ids).logits[0, -1].float()
            tied += (logits[theirs[parted]] - logits[ours_of.ids[parted]]).abs().item() < NEAR_TIE
    return equal, tied


def bandwidth_shares(generator: Generator, config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """How close decoding comes to copying: bytes a step has to read, a second, over the bandwidth of large copies."""
    ceilings, lines = measure_ceilings(CudaClock(), device, product_widths=(4096,))
    for line in lines:
        speak(line)
    shapes = parameter_shapes(config)
    # Of an embedding that is not the head a step reads B rows.
    skipped = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    weights = (sum(int(np.prod(shape)) for shape in shapes.values()) - skipped) * 2
    record: dict[str, Any] = {"copy TB/s": f"{ceilings.copy / 1e12:.2f}"}
    prompt, warm, steps = 512, 16, 128
    for rows in (1, 64):
        options = SamplingOptions(temperature=0.0, max_new_tokens=warm + steps + 16)
        random = np.random.default_rng(rows)
        for _ in range(rows):
            generator.add(Request(random.integers(0, config.vocab_size, prompt).tolist(), options))
        while generator.running < rows:
            generator.step()
        for _ in range(warm):
            generator.step()
        begin = now(device)
        for _ in range(steps):
            generator.step()
        seconds = (now(device) - begin) / steps
        while not generator.is_idle:
            generator.step()
        cached = rows * (prompt + warm + steps / 2) * page_bytes(config, torch.bfloat16) / PAGE
        share = (weights + cached) / seconds / ceilings.copy
        record |= {f"ms a step, {rows} rows": f"{1e3 * seconds:.2f}", f"% of copy, {rows} rows": f"{100 * share:.0f}"}
    return record


def main(config: BenchConfig) -> None:
    config.prepare()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = config.shape(device)
    requests = config.load.draw(shape.vocab_size)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_lively_model(directory, shape, config.load.seed, device)
        peer = Peer(directory, requests, device)
        ours = Ours(directory, shape, requests, device)
    ours.step()  # memory is touched, graphs are captured
    speeds = peer.find_settings(config.peer_batch_sizes, config.peer_caches)
    speak(f"{PEER}: " + ", ".join(f"{name}: {speed:,.0f} tok/s" for name, speed in speeds.items()))
    laps = race({OURS: ours, PEER: peer}, config.rounds)
    equal, tied = count_equal(ours, peer, requests)
    if equal + tied < len(requests) and device.type == "cpu":
        raise AssertionError(f"{len(requests) - equal - tied} answers differ where there is no near-tie")
    shares = bandwidth_shares(ours.generator, shape, device) if device.type == "cuda" else {}
    record = {
        "parameters": f"{shape.num_parameters / 1e6:.1f} M",
        "answer tokens": laps[OURS][0].tokens,
        **tokens_a_second(laps, PEER),
        "peer's batch size": peer.batch_size,
        "peer's cache": peer.cache,
        "equal answers": f"{equal} of {len(requests)}",
        **shares,
    }
    command = "python tools/bench_generate.py"
    keep(config, device, record, _COLUMNS, "Generation against transformers' generate", command, _told(config, shape))


_COLUMNS = {
    "Ours, tok/s": "our tok/s",
    "transformers, tok/s": "peer's tok/s",
    "Ratio": "ratio",
    "Its batch size": "peer's batch size",
    "Its cache": "peer's cache",
    "Equal answers": "equal answers",
    "Copy, TB/s": "copy TB/s",
    "1 row, ms": "ms a step, 1 rows",
    "% of copy": "% of copy, 1 rows",
    "64 rows, ms": "ms a step, 64 rows",
    "% of copy ": "% of copy, 64 rows",
}


def _told(config: BenchConfig, shape: ModelConfig) -> str:
    load = config.load
    return (
        f"A LLaMA of width {shape.hidden_size}, {shape.num_layers} blocks, {shape.num_heads} heads, "
        f"{shape.num_kv_heads} key-value heads, feed-forward width {shape.intermediate_size} and vocabulary "
        f"{shape.vocab_size}. {load.requests} prompts of lognormal length, median {load.median_prompt}, and as many "
        f"answers, median {load.median_answer}, both with a spread of {load.spread} and clipped to 8 and "
        f"{load.longest} tokens. Speeds are in tokens of answers, prompts computed in the same time, and medians of "
        "rounds taken in turn in one process. The rounds and all options of every record are in the .jsonl file "
        "beside this page."
    )


if __name__ == "__main__":
    run(main, BenchConfig)
