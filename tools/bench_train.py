"""Race the training step against transformers, transformers with Liger-Kernel and a compiled plain decoder.

    python tools/bench_train.py                                       # make bench-train
    python tools/bench_train.py --cases 7b-4096-full 1b-4096-sft      # these only
    python tools/bench_train.py --out docs/benchmarks/train-cpu       # and keep the result

On a GPU the shapes are of 1, 7 and 13 billion parameters (the last with as many layers as fit), and the page is kept as
docs/benchmarks/train-<gpu>; on a CPU they are small. Cases run in order of importance until the minutes are over. On a
GPU each contender is written down when it is done, on a CPU, where they take turns, each case. Which contenders there
are, and what is fair: tools/train_peers.py.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.benchmark import free, machine
from engine.data.corpus import Corpus
from engine.launch import run, speak
from engine.memory import MemoryPlan
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.metrics import peak_flops
from engine.shard import Precision
from engine.step_seconds import BANDWIDTHS
from kernels.bench.machine import ROOT, slug
from kernels.bench.machine import machine as gpu_facts
from kernels.fp8_linear import has_fp8
from model.errors import InputError
from tools.train_cases import Case, default_cases, fitted, named, ways
from tools.train_data import Step, loader_of, made_up_corpus, steps_of
from tools.train_ours import Ours
from tools.train_page import append, tables
from tools.train_peers import hugging_face, missing, plain
from tools.train_race import OURS, Contender, Sizes, measure
from tools.train_record import PEERS, Record, record

# Of an epoch: so many that its packs leave next to no padding, as in a long run.
_STEPS = 64
FP8, COMPILED = "ours+fp8", "ours+compile"


@dataclass
class BenchConfig:
    """Tokens a second, memory and parts of the training step, ours and others'."""

    cases: list[str] = field(default_factory=list)
    """what to run, as shape-context-kind; by default what suits the device"""
    contenders: list[str] = field(default_factory=list)
    """beside ours, in this order: transformers, liger, plain, ours+compile, and in cases of full documents ours+fp8; by
    default the first three, on a GPU behind ours+fp8, those with a target first"""
    minutes: float = 8.0
    """begin nothing new after that; what was not reached is named"""
    batch_tokens: int | None = None
    """tokens of an optimizer step; by default 32768 on a GPU and 2048 on a CPU"""
    tokens_per_pack: int | None = None
    """of one of our forward passes; by default chosen with --recompute"""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """what we compute again in the backward pass; auto: what makes the shortest step of what the memory plan lets fit,
    as predicted by engine/step_seconds.py"""
    laps: int = 3
    """times that each is timed; the median counts"""
    steps: int | None = None
    """optimizer steps of a lap; by default 2 on a GPU and 1 on a CPU"""
    trace: bool = True
    """look under the profiler where the time goes"""
    threads: int | None = None
    """threads of torch on a CPU; by default torch's choice"""
    seed: int = 0
    """of documents, their order, and weights"""
    out: str | None = None
    """append the records to OUT.jsonl, and write OUT.md and OUT.png; by default on a GPU only"""
    note: str = ""
    """a remark to keep with the records"""
    commit: str | None = None
    """where the checkout has no history"""

    def check(self) -> None:
        """Raises InputError where a name or a number makes no sense."""
        for name in ("batch_tokens", "tokens_per_pack", "laps", "steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} is {value}. Use at least 1.")
        there = [*PEERS, FP8, COMPILED]
        unknown = sorted(set(self.contenders) - set(there))
        if unknown:
            raise InputError(f"--contenders: there is no {', '.join(unknown)}. There are {', '.join(there)}.")


def main(config: BenchConfig) -> None:
    config.check()
    wanted = [named(name) for name in config.cases]
    if config.threads:
        torch.set_num_threads(config.threads)
    runtime = start(ParallelConfig())
    bench = _Bench(config, runtime)
    for name in bench.contenders:
        if reason := _missing(name, runtime.device):
            speak(f"Without {name}: {reason}.")
    cases = wanted or default_cases(bench.is_on_gpu)
    while cases and bench.has_time():
        try:
            bench.run(cases.pop(0))
        except InputError as error:
            if config.cases:
                raise
            speak(str(error))  # the others may fit
    stop()
    if cases:
        names = " ".join(case.name for case in cases)
        speak(f"Not reached in {config.minutes:g} minutes: {names}. Run them with --cases.")


def _missing(name: str, device: torch.device) -> str:
    """Why a contender takes no part; nothing where it can."""
    if name == FP8:
        return "" if has_fp8(device) else "this device has no 8-bit products"
    return "" if name == COMPILED else missing(name, device)


class _Bench:
    """Sizes that suit the device, and a case after the other."""

    def __init__(self, config: BenchConfig, runtime: Runtime) -> None:
        self.config, self.runtime, self.device = config, runtime, runtime.device
        self.is_on_gpu = self.device.type == "cuda"
        self.precision: Precision = "bf16" if self.is_on_gpu else "fp32"
        self.memory = torch.cuda.get_device_properties(self.device).total_memory if self.is_on_gpu else None
        self.batch_tokens = config.batch_tokens or (32768 if self.is_on_gpu else 2048)
        self.contenders = config.contenders or ([FP8, "liger", "plain", "transformers"] if self.is_on_gpu else [*PEERS])
        warm, steps, traced = (2, 2, 2) if self.is_on_gpu else (1, 1, 1)
        self.sizes = Sizes(warm, config.steps or steps, config.laps, traced if config.trace else 0)
        device_name = torch.cuda.get_device_name(self.device) if self.is_on_gpu else "cpu"
        default = ROOT / "docs" / "benchmarks" / f"train-{slug(device_name)}" if self.is_on_gpu else None
        self.out = Path(config.out) if config.out else default
        self.gpu = next((name for name in BANDWIDTHS if name in device_name), "H200")
        self._ends = time.monotonic() + 60 * config.minutes
        self._facts = self._machine()

    def has_time(self) -> bool:
        return time.monotonic() < self._ends

    def run(self, case: Case) -> None:
        """Measure a case by the first plan that turns out to fit, print its tables and keep its records.

        Raises:
            InputError: nothing fits.
        """
        case = fitted(case, self.batch_tokens, self.precision, self.memory)
        recompute = None if self.config.recompute == "auto" else self.config.recompute
        packs = self.config.tokens_per_pack
        plans, reason = ways(case, self.batch_tokens, self.precision, self.memory, recompute, packs, self.gpu)
        while plans:
            way = plans.pop(0)
            speak(f"{case.name}: packs of {way.setup.tokens_per_pack:,}, recompute {way.setup.recompute}. {reason}")
            try:
                return self._measure(case, way, reason)
            except torch.cuda.OutOfMemoryError:
                reason = f"The plan said {way.peak.total / 2**30:.1f} GiB, and it did not fit. {reason}"
            free()  # what the exception held
            plans = [one for one in plans if one.needed_bytes < way.needed_bytes]
        raise InputError(f"{case.name} does not fit this device. Choose other --cases, or --recompute full.")

    def _measure(self, case: Case, way: MemoryPlan, reason: str) -> None:
        """Keep each record as soon as it is there, and print those of the case in the end.

        Raises:
            torch.cuda.OutOfMemoryError: ours does not fit; nothing was kept.
        """
        seed, sizes, peak = self.config.seed, self.sizes, peak_flops(self.device)
        records: dict[str, Record] = {}
        with tempfile.TemporaryDirectory() as directory:
            tokens = max(_STEPS, sizes.total + 1) * self.batch_tokens
            corpus = made_up_corpus(case.kind, case.context, case.model.vocab_size, tokens, seed, Path(directory))
            load = partial(self._loader, corpus, case, way)
            with closing(load()) as loader:
                steps = steps_of(loader, case.kind, case.context, sizes.total)
            builders = self._builders(case, way, steps, load)
            head_rows = 1 if case.kind == "reward" else case.model.vocab_size
            for name, outcome in measure(builders, steps, sizes, self.device, head_rows, self.has_time):
                found = record(case, name, outcome, steps, sizes, way, peak)
                records[name] = {**self._facts, **found, "choice": reason, "config": asdict(self.config)}
                self._keep(records[name])
        print(tables(list(records.values())), flush=True)
        if late := " ".join(name for name in builders if name not in records):
            speak(f"Not reached: {late}. Run them with --cases {case.name} --contenders {late}.")

    def _loader(self, corpus: Corpus, case: Case, way: MemoryPlan) -> Any:
        packs = (way.setup.tokens_per_pack, case.context, way.setup.micro_batches)
        return loader_of(corpus, case.kind, self.config.seed, *packs)

    def _builders(
        self, case: Case, way: MemoryPlan, steps: list[Step], load: Callable[[], Any]
    ) -> dict[str, Callable[[], Contender]]:
        """By name, ours first; without those that are not installed."""
        model, place = case.model, (self.device, self.precision)
        every: dict[str, Callable[[], Contender]] = {
            "transformers": lambda: hugging_face(model, steps, *place, with_liger=False),
            "liger": lambda: hugging_face(model, steps, *place, with_liger=True),
            "plain": lambda: plain(model, steps, *place, is_ragged=case.kind in ("sft", "reward")),
        }
        in_8_bits = way.replan(replace(way.setup, fp8=True))
        for name, plan, is_compiled in ((OURS, way, False), (FP8, in_8_bits, False), (COMPILED, way, True)):
            every[name] = partial(self._ours, plan, load, is_compiled)
        there = [name for name in self.contenders if not _missing(name, self.device)]
        return {name: every[name] for name in [OURS, *there] if name != FP8 or case.kind == "full"}

    def _ours(self, way: MemoryPlan, load: Callable[[], Any], is_compiled: bool) -> Ours:
        with ExitStack() as failing:
            loader = failing.enter_context(closing(load()))
            ours = Ours(way, loader, self.runtime, self.config.seed, is_compiled)
            failing.pop_all()
        return ours

    def _keep(self, found: Record) -> None:
        speed = found.get("tokens_per_second")
        told = [f"{speed:,.0f} tokens/s"] if speed else []
        speak(
            f"{found['case']}, {found['contender']}: {'; '.join(told + [found['failure']] * bool(found['failure']))}."
        )
        if self.out is not None:
            command = "python tools/bench_train.py" + (f" --out {self.config.out}" if self.config.out else "")
            append([found], self.out, command)

    def _machine(self) -> Record:
        """What all records of this run have in common."""
        facts: Record = machine(self.device)
        if self.config.commit:
            facts["commit"] = self.config.commit
        if self.is_on_gpu:
            facts["driver"] = gpu_facts(self.device, facts["commit"])["driver"]
        for name, package in (("triton", "triton"), ("transformers", "transformers"), ("liger", "liger_kernel")):
            try:
                facts[name] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                facts[name] = None
        return facts | {"precision": self.precision, "note": self.config.note}


if __name__ == "__main__":
    run(main, BenchConfig)
