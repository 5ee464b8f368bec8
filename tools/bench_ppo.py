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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.benchmark import fastest, speeds_by_size
from engine.launch import run, speak
from engine.mesh import ParallelConfig, start, stop
from engine.shard import Precision
from model.config import ModelConfig
from model.errors import InputError
from tools.ppo_racers import Iteration, Load, Ours, Peer, import_trl, largest_difference, write_base
from tools.racing import OURS, RaceConfig, keep, precision_on, require_shape, shape_of

PEER = "TRL"
# Log-probabilities of two right computations in fp32.
_SAME = 1e-3


@dataclass
class BenchConfig(RaceConfig):
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
    load: Load = field(default_factory=Load)

    def check(self) -> None:
        """Raises InputError where numbers do not fit together."""
        super().check()
        require_shape(self.model)
        load = self.load
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
        name, shape = shape_of(self.model, device, "1b")
        needed = self.load.longest_prompt + self.load.longest_answer
        if needed > shape.max_position_embeddings:
            limit = shape.max_position_embeddings
            raise InputError(f"Prompts and answers of {needed} tokens exceed the context of {name}, {limit}.")
        return shape


def main(config: BenchConfig) -> None:
    config.prepare()
    if config.peer == "trl":
        import_trl()
    runtime = start(ParallelConfig())
    shape = config.shape(runtime.device)
    precision = precision_on(runtime.device)
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
            speeds = speeds_by_size(
                config.peer_batch_sizes,
                lambda size: Peer(directory, texts, config.load, size, runtime).race(1)[0].speed,
            )
            speak(
                f"{PEER} by batch size: " + ", ".join(f"{size}: {speed:,.0f} tok/s" for size, speed in speeds.items())
            )
            peer = Peer(directory, texts, config.load, fastest(speeds), runtime)
            facts = {"peer's batch size": peer.batch_size, "largest difference": _compare(peer, ours, precision)}
            ours.learner.begin()  # the same prompts again
            laps[PEER] = peer.race(config.rounds, between=lambda: laps[OURS].append(ours.step()))
    stop()
    title, command = "An iteration of reinforcement learning against TRL's GRPO trainer", "python tools/bench_ppo.py"
    keep(config, runtime.device, _record(config, shape, laps) | facts, _COLUMNS, title, command, _told(config, shape))


def _compare(peer: Peer, ours: Ours, precision: Precision) -> str:
    """Whether both compute the same: log-probabilities of what we sampled before our first update."""
    difference = largest_difference(peer, ours.samples)
    if precision == "fp32" and difference > _SAME:
        raise AssertionError(f"log-probabilities differ by {difference:.2g}: these are not the same computations")
    return f"{difference:.1e}"


def _record(config: BenchConfig, shape: ModelConfig, laps: dict[str, list[Iteration]]) -> dict[str, Any]:
    speeds = {who: float(np.median([lap.speed for lap in of])) for who, of in laps.items()}
    record = {
        "parameters": f"{shape.num_parameters / 1e6:.1f} M",
        "answers": f"{config.load.prompts} x {config.load.samples}, at most {config.load.longest_answer}"
        + (f", mean {config.load.mean_answer} uncut" if config.load.mean_answer else ""),
        "epochs x minibatches": f"{config.load.epochs} x {config.load.minibatches}",
        "our tok/s": f"{speeds[OURS]:,.0f}",
        "our generation": _share(laps[OURS], "generation"),
    }
    if PEER in laps:
        record |= {
            "trl": import_trl()[0].__version__,
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
        "microseconds a token": of_phases,
        "iterations": {who: [asdict(lap) for lap in of] for who, of in laps.items()},
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
    "TRL": "trl",
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
}


def _told(config: BenchConfig, shape: ModelConfig) -> str:
    load = config.load
    return (
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


if __name__ == "__main__":
    run(main, BenchConfig)
