"""Race a whole iteration of reinforcement learning against TRL's GRPO trainer, on this machine.

    python tools/bench_ppo.py                                 # make bench-ppo
    python tools/bench_ppo.py --out docs/benchmarks/ppo-cpu   # and keep the result
    python tools/bench_ppo.py --peer none                     # without TRL

Both sample several answers to each prompt, score them with one function, read log-probabilities of policy and
reference, and train some epochs on the answers: group advantages, clipped ratios, k3 in the loss, a mean over all
sampled tokens. Weights, prompts, sizes of steps, AdamW, precision and threads are the same, and iterations are taken in
turn. TRL runs at the batch size at which it is fastest, without gradient checkpointing.

Answers end at any of several tokens, so that their lengths are geometric, as a model that knows nothing draws them:
most are short and some are cut, as in real rollouts. With --load.mean_answer 0 nothing ends them and all are equally
long. A speed is the tokens of prompts and answers over the seconds of whole iterations.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.benchmark import append_record, machine
from engine.launch import run, speak
from engine.mesh import ParallelConfig, start, stop
from engine.shard import Precision
from model.config import PRESETS, ModelConfig
from model.errors import InputError
from tools.ppo_racers import Iteration, Load, Ours, Peer, import_trl, largest_difference, write_base

OURS, PEER = "this engine", "TRL"
# Log-probabilities of two right computations in fp32.
_SAME = 1e-3

SMALL = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1376,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=1024,
)


@dataclass
class BenchConfig:
    """Tokens a second of a whole iteration, against TRL."""

    model: str | None = None
    """a preset, or `small`: width 512, 8 blocks; by default `small` on a CPU and `1b` on a GPU"""
    peer: Literal["trl", "none"] = "trl"
    """whom to race"""
    rounds: int = 3
    """iterations of each, in turn"""
    peer_batch_sizes: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    """answers of one forward pass of the peer, ascending: the fastest races"""
    micro_batch_tokens: int = 1024
    """tokens of one of our forward passes"""
    threads: int | None = None
    """threads of torch on a CPU; by default torch's choice"""
    out: str | None = None
    """append the result to OUT.jsonl and its table to OUT.md"""
    note: str = ""
    """a remark to keep with the result"""
    load: Load = field(default_factory=Load)

    def check(self) -> None:
        """Raises InputError where numbers do not fit together."""
        load = self.load
        if self.rounds < 1:
            raise InputError(f"--rounds is {self.rounds}. Use at least 1.")
        if self.model not in (None, "small", *PRESETS):
            raise InputError(f"--model is {self.model!r}. Use small, {', '.join(PRESETS)}.")
        if load.samples < 2:
            raise InputError(f"--load.samples is {load.samples}. Answers are compared in groups: use 2 or more.")
        step = load.answers // load.minibatches
        if load.answers % load.minibatches or any(step % size for size in self.peer_batch_sizes):
            raise InputError(
                f"An optimizer step of {load.answers} answers over {load.minibatches} minibatches is no multiple of "
                f"every one of --peer_batch_sizes {' '.join(map(str, self.peer_batch_sizes))}. Change one of them."
            )
        if self.micro_batch_tokens < load.longest_prompt + load.longest_answer:
            raise InputError(
                f"--micro_batch_tokens {self.micro_batch_tokens} cannot hold a prompt of {load.longest_prompt} tokens "
                f"with an answer of {load.longest_answer}. Raise it, or shorten them."
            )

    def shape(self, device: torch.device) -> ModelConfig:
        name = self.model or ("1b" if device.type == "cuda" else "small")
        shape = SMALL if name == "small" else PRESETS[name]
        needed = self.load.longest_prompt + self.load.longest_answer
        if needed > shape.max_position_embeddings:
            limit = shape.max_position_embeddings
            raise InputError(f"Prompts and answers of {needed} tokens exceed the context of {name}, {limit}.")
        return shape


def find_batch_size(make: Callable[[int], Peer], sizes: list[int]) -> dict[int, float]:
    """Speeds by batch size, ascending; stops when two in a row were slower than the best."""
    speeds: dict[int, float] = {}
    for size in sizes:
        try:
            speeds[size] = make(size).race(1)[0].speed
        except torch.cuda.OutOfMemoryError:
            break
        if max(speeds.values()) > max(list(speeds.values())[-2:]):
            break
    return speeds


def main(config: BenchConfig) -> None:
    config.check()
    if config.peer == "trl":
        import_trl()
    if config.threads:
        torch.set_num_threads(config.threads)
    runtime = start(ParallelConfig())
    shape = config.shape(runtime.device)
    precision: Precision = "bf16" if runtime.device.type == "cuda" else "fp32"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    texts = config.load.texts(shape.vocab_size, config.load.prompts * config.rounds)
    laps: dict[str, list[Iteration]] = {OURS: []}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_base(directory, shape, config.load, torch.float32)
        ours = Ours(directory, texts, config.load, config.micro_batch_tokens, precision, runtime)
        ours.step()  # memory is touched
        if config.peer == "none":
            laps[OURS] = [ours.step() for _ in range(config.rounds)]
        else:
            speeds = find_batch_size(
                lambda size: Peer(directory, texts, config.load, size, runtime), config.peer_batch_sizes
            )
            speak(
                f"{PEER} by batch size: " + ", ".join(f"{size}: {speed:,.0f} tok/s" for size, speed in speeds.items())
            )
            peer = Peer(directory, texts, config.load, max(speeds, key=lambda size: speeds[size]), runtime)
            facts = {"peer's batch size": peer.batch_size, "largest difference": _compare(peer, ours, precision)}
            ours.learner.begin()  # the same prompts again
            laps[PEER] = peer.race(config.rounds, between=lambda: laps[OURS].append(ours.step()))
    stop()
    record = _record(config, shape, runtime.device, precision, laps, facts)
    for name, value in record.items():
        if not isinstance(value, dict | list):
            print(f"{name:<24}{value}")
    if config.out:
        append_record(Path(config.out), record, _heading(config, shape), _COLUMNS)


def _compare(peer: Peer, ours: Ours, precision: Precision) -> str:
    """Whether both compute the same: log-probabilities of what we sampled before our first update."""
    difference = largest_difference(peer, ours.samples)
    if precision == "fp32" and difference > _SAME:
        raise AssertionError(f"log-probabilities differ by {difference:.2g}: these are not the same computations")
    return f"{difference:.1e}"


def _record(
    config: BenchConfig,
    shape: ModelConfig,
    device: torch.device,
    precision: Precision,
    laps: dict[str, list[Iteration]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    versions = {}
    if PEER in laps:
        trl, _ = import_trl()
        versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    speeds = {who: float(np.median([lap.speed for lap in of])) for who, of in laps.items()}
    record = {
        **machine(device),
        **versions,
        "precision": precision,
        "parameters": f"{shape.num_parameters / 1e6:.1f} M",
        "answers": f"{config.load.prompts} x {config.load.samples}, at most {config.load.longest_answer}"
        + (f", mean {config.load.mean_answer} uncut" if config.load.mean_answer else ""),
        "epochs x minibatches": f"{config.load.epochs} x {config.load.minibatches}",
        "our tok/s": f"{speeds[OURS]:,.0f}",
        "our generation": _share(laps[OURS], "generation"),
    }
    if PEER in laps:
        record |= {
            "peer's tok/s": f"{speeds[PEER]:,.0f}",
            "ratio": _ratio([ours.speed / its.speed for ours, its in zip(laps[OURS], laps[PEER], strict=True)]),
            "peer's generation": _share(laps[PEER], "generation"),
        }
        for phase in ("generation", "reading", "update"):
            pairs = zip(_paces(laps[OURS], phase), _paces(laps[PEER], phase), strict=True)
            record[f"{phase} ratio"] = _ratio([its / ours for ours, its in pairs])
    of_phases = {
        who: {phase: round(float(np.median(_paces(of, phase))) * 1e6, 1) for phase in of[0].phases}
        for who, of in laps.items()
    }
    return {
        **record,
        **facts,
        "rounds": config.rounds,
        "note": config.note,
        "microseconds a token": of_phases,
        "iterations": {who: [asdict(lap) for lap in of] for who, of in laps.items()},
        "config": asdict(config),
    }


def _ratio(rounds: list[float]) -> str:
    """The median round's: both have the same prompts in it, and what else the machine does then."""
    return f"{np.median(rounds):.2f}"


def _paces(laps: list[Iteration], phase: str) -> list[float]:
    """Seconds of a phase a token of prompts and answers, of each iteration."""
    return [lap.phases[phase] / (lap.prompt_tokens + lap.answer_tokens) for lap in laps]


def _share(laps: list[Iteration], phase: str) -> str:
    return f"{100 * sum(lap.phases[phase] for lap in laps) / sum(lap.seconds for lap in laps):.0f}%"


_COLUMNS = {
    "Date": "date",
    "Device": "device",
    "Threads": "threads",
    "torch": "torch",
    "TRL": "trl",
    "transformers": "transformers",
    "Precision": "precision",
    "Parameters": "parameters",
    "Answers": "answers",
    "Epochs x minibatches": "epochs x minibatches",
    "Ours, tok/s": "our tok/s",
    "TRL, tok/s": "peer's tok/s",
    "Ratio": "ratio",
    "Generation": "generation ratio",
    "Reading": "reading ratio",
    "Update": "update ratio",
    "Our generation": "our generation",
    "Its generation": "peer's generation",
    "Its batch size": "peer's batch size",
    "Rounds": "rounds",
    "Commit": "commit",
    "Note": "note",
}


def _heading(config: BenchConfig, shape: ModelConfig) -> str:
    load = config.load
    text = (
        f"A LLaMA of width {shape.hidden_size}, {shape.num_layers} blocks, {shape.num_heads} heads, feed-forward width "
        f"{shape.intermediate_size} and vocabulary {shape.vocab_size}. Prompts are of lognormal length, median "
        f"{load.median_prompt}, with a spread of {load.spread}, clipped to 8 and {load.longest_prompt} tokens. An "
        "iteration samples answers, scores them, reads log-probabilities of policy and reference, and trains on them: "
        "the same group advantages, clipped loss, k3 and AdamW on both sides. Speeds are tokens of prompts and answers "
        "(each answer with its prompt) over the seconds of iterations, medians of rounds taken in turn in one process. "
        "Ratios are the median round's, above 1 in our favour; those of phases are of seconds a token. Where answers "
        "have a mean, they end by themselves, at geometric lengths; else all have the length given. Rounds, phases and "
        "all options of every record are in the .jsonl file beside this page."
    )
    title = "# An iteration of reinforcement learning against TRL's GRPO trainer"
    told = textwrap.fill(text, 118, break_on_hyphens=False)
    return f"{title}\n\n    python tools/bench_ppo.py --out {config.out}\n\n{told}"


if __name__ == "__main__":
    run(main, BenchConfig)
