"""Race the training step against a plain loop over transformers' LlamaForCausalLM, on this machine.

    python tools/bench_train.py                                   # make bench-train
    python tools/bench_train.py --out docs/benchmarks/train-cpu   # and keep the result

Same shape, same documents, same tokens an optimizer step; steps are taken in turn. The peer pads its batches to
their longest document and runs at the batch size at which it is fastest (gradients are accumulated over batches),
with torch's AdamW, fused or not, whichever is faster. On a GPU both compute in bf16 over fp32 weights.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.benchmark import (
    BenchShape,
    Engine,
    Lap,
    bench_corpus,
    median_speed,
    now,
    race,
    steps_of_documents,
)
from engine.data.corpus import Corpus
from engine.launch import run, speak
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.shard import Precision
from model.batch import IGNORE
from model.errors import InputError
from tools.racing import OURS, RaceConfig, fastest, keep, precision_on, speeds_by_size, tokens_a_second

PEER = "transformers"


@dataclass
class BenchConfig(RaceConfig):
    """Tokens a second of the training step, against a plain loop over transformers."""

    rounds: int = 7
    """steps of each, taken in turn"""
    batch_tokens: int = 4096
    """tokens of an optimizer step"""
    tokens_per_pack: int = 1024
    """tokens of one of our forward passes"""
    peer_batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    """documents of one of the peer's forward passes, ascending: the fastest races"""
    shape: BenchShape = field(default_factory=BenchShape)

    def check(self) -> None:
        """Raises InputError where numbers do not fit together."""
        super().check()
        if self.tokens_per_pack < self.shape.context or self.batch_tokens % self.tokens_per_pack:
            raise InputError(
                f"--tokens_per_pack {self.tokens_per_pack} must divide --batch_tokens {self.batch_tokens} and hold "
                f"--shape.context {self.shape.context}. Change one of them."
            )
        if not self.peer_batch_sizes or min(self.peer_batch_sizes) < 1:
            raise InputError("--peer_batch_sizes needs at least one number, all of them at least 1.")


class Peer:
    """What one would write with transformers: pad, forward, backward, clip, step."""

    def __init__(self, shape: BenchShape, corpus: Corpus, runtime: Runtime, precision: Precision, batch: int) -> None:
        torch.manual_seed(shape.seed)
        config = shape.model()
        llama = transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self._device, self._precision = runtime.device, precision
        self._model = transformers.LlamaForCausalLM(llama).to(self._device).train()
        self._steps = steps_of_documents(corpus, shape.seed, batch)
        self._optimizer = self._fastest_adamw()
        self.batch_size = 1
        self.padding_share = 0.0

    def step(self) -> Lap:
        # Our determinism is not asked of the peer: on a GPU it would slow it down.
        torch.use_deterministic_algorithms(False)
        begin = now(self._device)
        documents = next(self._steps)
        # The first token of a document is nobody's target.
        targets = sum(len(document) - 1 for document in documents)
        padded = 0
        for first in range(0, len(documents), self.batch_size):
            batch = _collate(documents[first : first + self.batch_size])
            padded += batch["input_ids"].numel()
            batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
                loss = self._model(**batch, num_items_in_batch=targets).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        seconds = now(self._device) - begin
        torch.use_deterministic_algorithms(True, warn_only=True)
        tokens = sum(map(len, documents))
        self.padding_share = 1 - tokens / padded
        return Lap(tokens, seconds)

    def find_batch_size(self, sizes: list[int], laps: int = 2) -> dict[int, float]:
        """Take the fastest batch size; returns the speeds."""

        def speed(size: int) -> float:
            self.batch_size = size
            return median_speed([self.step() for _ in range(laps)])

        speeds = speeds_by_size(sizes, speed)
        self._optimizer.zero_grad()  # of a step that memory was too small for
        self.batch_size = fastest(speeds)
        return speeds

    def _fastest_adamw(self) -> torch.optim.Optimizer:
        """Fused or not, by the time of some steps on zero gradients."""
        times = []
        for fused in (True, False):
            optimizer = torch.optim.AdamW(
                self._model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
            )
            for parameter in self._model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            begin = now(self._device)
            for _ in range(3):
                optimizer.step()
            times.append((now(self._device) - begin, optimizer))
            optimizer.zero_grad()
        return min(times, key=lambda timed: timed[0])[1]


def _collate(documents: list[Tensor]) -> dict[str, Tensor]:
    """Padded on the right to the longest, as transformers' collators do."""
    shape = (len(documents), max(map(len, documents)))
    ids, mask, labels = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, IGNORE)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = labels[row, : len(document)] = document
        mask[row, : len(document)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main(config: BenchConfig) -> None:
    config.prepare()
    runtime = start(ParallelConfig())
    precision = precision_on(runtime.device)
    with tempfile.TemporaryDirectory() as directory:
        corpus = bench_corpus(config.shape, Path(directory))
        ours = Engine(config.shape, corpus, runtime, precision, config.tokens_per_pack, config.batch_tokens)
        peer = Peer(config.shape, corpus, runtime, precision, config.batch_tokens)
        race({OURS: ours, PEER: peer}, 1)  # memory is touched, kernels are chosen
        speeds = peer.find_batch_size(config.peer_batch_sizes)
        speak(f"{PEER} by batch size: " + ", ".join(f"{size}: {speed:,.0f} tok/s" for size, speed in speeds.items()))
        laps = race({OURS: ours, PEER: peer}, config.rounds)
        ours.close()
    stop()
    waited, seconds = (sum(getattr(lap, name) for lap in laps[OURS]) for name in ("data_wait", "seconds"))
    record = {
        "parameters": f"{config.shape.model().num_parameters / 1e6:.1f} M",
        "tokens a step": config.batch_tokens,
        **tokens_a_second(laps, PEER),
        "peer's batch size": peer.batch_size,
        "our padding": f"{ours.padding_share:.2%}",
        "peer's padding": f"{peer.padding_share:.2%}",
        "our data wait": f"{waited / seconds:.3%}",
    }
    title, command = "Training throughput against a plain loop over transformers", "python tools/bench_train.py"
    keep(config, runtime.device, record, _COLUMNS, title, command, _told(config))


_COLUMNS = {
    "Ours, tok/s": "our tok/s",
    "transformers, tok/s": "peer's tok/s",
    "Ratio": "ratio",
    "Its batch size": "peer's batch size",
    "Data wait": "our data wait",
}


def _told(config: BenchConfig) -> str:
    shape = config.shape
    return (
        f"A LLaMA of width {shape.hidden_size}, {shape.num_layers} blocks, {shape.num_heads} heads, feed-forward width "
        f"{shape.intermediate_size}, vocabulary {shape.vocab_size} and context {shape.context}. Document lengths are "
        f"lognormal with median {shape.median_length} and a spread of {shape.spread}, clipped to 16 and the context. "
        "Both train on the same documents with the same tokens an optimizer step; ours runs in packs, the peer in "
        "padded batches of the size at which it is fastest, accumulating gradients. Speeds are in real tokens, and "
        "medians of rounds taken in turn in one process. The rounds and all options of every record are in the .jsonl "
        "file beside this page."
    )


if __name__ == "__main__":
    run(main, BenchConfig)
