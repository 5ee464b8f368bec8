"""What carries the loop: where it stands, its clock, its log, its checkpoints, and the ways to end.

A checkpoint holds the state at the end of an iteration. A signal that arrives in the middle of one is heard between two
phases: until the update, nothing but counters has moved, so the state of the iteration before is saved, and a resumed
run samples the same answers again.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import Checkpointer
from engine.launch import DivergedError, StoppedError
from engine.loggers import RunLog
from engine.loop import require_same_run, say_resumed
from engine.lora import FrozenBase, require_same_base
from engine.metrics import peak_memory_bytes
from engine.signals import StopSignals
from engine.watchdog import Watchdog
from rlhf.learner import Learner, Looked
from rlhf.monitor import Limits, SampleTable, advantage_statistics, answer_statistics, negative_kl
from rlhf.ppo_config import PpoConfig
from rlhf.prompts import Prompt
from rlhf.trajectory import Sample, Trajectory

PANELS = (
    ("objective/reward_mean", "held_out/reward"),
    ("objective/kl", "held_out/kl"),
    ("response/length_mean", "held_out/length"),
    ("policy/grad_norm", "value/grad_norm"),
    ("objective/entropy",),
    ("value/explained_variance",),
)


@dataclass
class Progress:
    """All state of the session that is numbers. tokens: of all answers so far."""

    iteration: int = 0
    tokens: int = 0
    best_reward: float | None = None


class Session:
    """A run of the loop in its directory. A context: entering it resumes, leaving it closes its files.

    Args:
        config: the resolved recipe, kept beside the model.
        identity: what a checkpoint must share with this run to be its own, by name.
        publish: writes the policy as a model directory, after so many iterations; a collective.
        bases: what adapters stand on, by the option that names it.
    """

    def __init__(
        self,
        learner: Learner,
        config: PpoConfig,
        identity: dict[str, Any],
        publish: Callable[[Path, int], None],
        bases: Mapping[str, FrozenBase] | None = None,
    ) -> None:
        assert config.train.steps is not None
        self._learner, self._config, self._identity, self._publish = learner, config, identity, publish
        self._bases = bases or {}
        self._runtime, self._iterations = learner.runtime, config.train.steps
        self.directory = Path(config.out)
        self._checkpointer = Checkpointer(
            self.directory, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
        )
        self._progress, self._limits = Progress(), Limits(config.limits)
        self._seconds: dict[str, float] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        self._resume()
        done = self._progress.iteration
        self._started_at = done
        self._dog = Watchdog(60 * self._config.parallel.timeout_minutes, self._runtime.name)
        with ExitStack() as stack:
            self._log = stack.enter_context(
                closing(RunLog(self.directory, done, self._config.log, self._config, PANELS, self.is_over))
            )
            self._signals = stack.enter_context(StopSignals())
            stack.enter_context(self._dog)
            self._table = SampleTable(
                self.directory / "samples.jsonl", done, self._config.log.samples, self._runtime.is_main
            )
            stack.enter_context(closing(self._learner))
            self._stack = stack.pop_all()
        self._saved = self._numbers()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        if kind is DivergedError:  # on every rank alike; what is being written is still good
            self._checkpointer.wait()
        self._stack.__exit__(kind, *exception)

    @property
    def iteration(self) -> int:
        """Iterations done; the number of the one at work, from 0."""
        return self._progress.iteration

    @property
    def is_over(self) -> bool:
        return self.iteration == self._iterations

    def is_due(self, every: int, at_start: bool = False) -> bool:
        """Whether something that happens every so often, and at the end, happens now."""
        if at_start and self.iteration == 0:
            return True
        return self.is_over or bool(every and self.iteration % every == 0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase. A stop that was asked for happens before it begins.

        Raises:
            StoppedError: after saving.
        """
        # A phase may take longer than the watchdog waits; a token or a step of it may not.
        self._learner.beat = functools.partial(self._dog.beat, f"in {name} of iteration {self.iteration + 1}")
        self._learner.beat()
        self._stop_if_asked()
        begin = time.perf_counter()
        yield
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[name] = time.perf_counter() - begin

    def advance(self) -> None:
        """An iteration is done: from here on this is the state that a checkpoint holds."""
        self._progress.iteration += 1

    def log(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[Sample],
        trajectory: Trajectory,
        raw: Tensor,
        report: dict[str, float],
    ) -> None:
        """Write down the iteration that is done.

        Raises:
            DivergedError: a limit was crossed too often.
        """
        progress, config = self._progress, self._config
        progress.tokens += int(trajectory.actions.sum())
        row = {
            **report,
            **answer_statistics(trajectory, raw, config.kl.kind),
            **advantage_statistics(trajectory),
            "tokens": progress.tokens,
            "tokens_per_second": len(trajectory.tokens) / sum(self._seconds.values()),
            "memory_bytes": peak_memory_bytes(self._runtime.device),
            **{f"seconds/{name}": seconds for name, seconds in self._seconds.items()},
            **{f"seconds/rollout/{part}": seconds for part, seconds in self._learner.rollout.seconds.items()},
        }
        self._log.record(self.iteration, row)
        self._table.write(self.iteration, prompts, samples, trajectory, raw)
        if self.iteration % config.log.every == 0 or self.iteration in (1, self._iterations):
            self._log.progress(self._line(row))
        if warning := negative_kl(row):
            self._log.say(f"iteration {self.iteration}: {warning}")
        self._seconds = {}
        self._limits.look(self.iteration, row)
        self._saved = self._numbers()

    def show(self, looked: Looked) -> None:
        """Write down a look at held-out prompts; keep the best policy so far."""
        self._seconds = {}
        self._log.record(self.iteration, looked.row)
        self._table.write(
            self.iteration, looked.prompts, looked.samples, looked.trajectory, looked.raw, is_held_out=True
        )
        row = looked.row
        self._log.say(f"iteration {self.iteration}, held out: {describe_look(row, len(looked.prompts))}")
        reward, best = row["held_out/reward"], self._progress.best_reward
        if math.isfinite(reward) and (best is None or reward > best):
            self._progress.best_reward = reward
            if self._config.checkpoint.keep_best and self.iteration:
                self._dog.beat("publishing the best policy so far")
                self._publish(self.directory / "best", self.iteration)

    def save(self) -> None:
        """Save the state at the end of the last iteration that is done."""
        self._dog.beat(f"saving after iteration {self.iteration}")
        self._checkpointer.save(self.iteration, self._learner.tensors(), self._saved)
        if self.iteration < self._iterations:  # else `publish` draws
            self._log.draw()

    def publish(self) -> None:
        """Make the run directory a model directory."""
        self._dog.beat("publishing the policy")
        self._checkpointer.wait()
        self._publish(self.directory, self.iteration)
        self._log.draw()

    def _stop_if_asked(self) -> None:
        votes = torch.tensor([float(self._signals.wants_stop)], device=self._runtime.device)
        if not self._runtime.sum(votes).item():
            return
        self.save()
        self._dog.beat("finishing the save")
        self._checkpointer.wait()
        raise StoppedError(
            f"Stopped by a signal; saved after iteration {self.iteration}. The same command goes on from there.",
            self._signals.exit_code,
        )

    def _numbers(self) -> dict[str, Any]:
        """All state that is no tensor."""
        return {
            "identity": self._identity,
            "bases": {option: asdict(base) for option, base in self._bases.items()},
            "progress": asdict(self._progress),
            "limits": dict(self._limits.counts),
            "learner": self._learner.numbers(),
        }

    def _resume(self) -> None:
        """Fill everything from the newest checkpoint that all ranks agree on, if there is one."""
        step = self._checkpointer.latest()
        if step is None:
            return self._learner.begin()
        trainer = self._checkpointer.load(step, self._learner.tensors())
        require_same_run(self.directory, trainer["identity"], self._identity, step, self._iterations, "iterations")
        for option, base in self._bases.items():
            require_same_base(self.directory, trainer["bases"].get(option), base, option)
        self._learner.begin(trainer["learner"])
        self._progress = Progress(**trainer["progress"])
        self._limits.counts = trainer["limits"]
        say_resumed(self.directory, step, self._iterations, "iteration")

    def _line(self, row: dict[str, Any]) -> str:
        kl = [f"kl {row['objective/kl']:.3g}"] if "objective/kl" in row else []
        explained = [f"explained {row['value/explained_variance']:.2f}"] if "value/explained_variance" in row else []
        return "  ".join(
            [
                f"iteration {self.iteration}/{self._iterations}",
                f"reward {row['objective/reward_mean']:.3g} ± {row['objective/reward_std']:.2g}",
                *kl,
                f"length {row['response/length_mean']:.0f}",
                f"entropy {row['objective/entropy']:.3g}",
                *explained,
                f"{row['tokens_per_second']:,.0f} tok/s",
            ]
        )


def describe_look(row: Mapping[str, float], prompts: int) -> str:
    """Means over held-out prompts with their intervals; of one prompt there is none."""
    means = {name: row[f"held_out/{name}"] for name in ("reward", "kl", "length") if f"held_out/{name}" in row}
    if prompts == 1:
        return ", ".join(f"{name} {mean:.3g}" for name, mean in means.items()) + " (one prompt)"
    return ", ".join(f"{name} {mean:.3g} ± {row[f'held_out/{name}_interval']:.2g}" for name, mean in means.items())
