"""The one training loop: data, step, log, save, evaluate.

It reads top to bottom; what it calls says what it does. The host handles each step's numbers one step late, so
that a GPU never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from engine.checkpoint import Checkpointer
from engine.config import check_range
from engine.evaluation import held_out_means, perplexity
from engine.guard import Guard
from engine.launch import DivergedError, StoppedError, speak
from engine.loggers import PANELS, LogConfig, RunLog
from engine.lora import FrozenBase, require_same_base
from engine.masters import Master
from engine.mesh import Runtime
from engine.metrics import Speedometer, peak_flops, peak_memory_bytes
from engine.optim import AdamW
from engine.signals import StopSignals
from engine.step import MicroBatch, Objective, PendingReport, StepReport, train_step
from engine.watchdog import BusyClock, Stragglers, Watchdog
from model.errors import InputError


class Loader(Protocol):
    """Where micro-batches come from.

    cursor: the JSON state after the last step handed out; its "tokens" are those of all steps and ranks, without
        padding.
    wait_seconds: how long that step was waited for.
    describe: one sentence on what has been handed out.
    """

    wait_seconds: float

    @property
    def cursor(self) -> dict[str, Any]: ...

    def next_step(self) -> Sequence[MicroBatch]: ...

    def describe(self) -> str: ...

    def close(self) -> None: ...


@dataclass
class EvalConfig:
    """Held-out text: which, how much, how often."""

    every: int = 200
    """steps between looks at held-out loss; 0 looks only at the end"""
    fraction: float = 0.005
    """share of documents held out of training, chosen by their hash"""
    data: list[str] = field(default_factory=list)
    """held-out files; instead of a share of the training documents"""
    max_tokens: int = 1_000_000
    """held-out tokens read at each look"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("eval", self, 0, "every")
        check_range("eval", self, 0, "fraction", below=1)
        check_range("eval", self, 1, "max_tokens")


@dataclass
class CheckpointConfig:
    """Training state: how often it is saved, how much of it is kept."""

    every: int = 500
    """steps between saves; the last step is always saved; 0 saves only then"""
    keep: int = 2
    """newest checkpoints kept"""
    asynchronous: bool = False
    """write in the background, from a copy in CPU memory"""
    keep_best: bool = False
    """also keep the model with the lowest held-out loss so far, under OUT/best"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("checkpoint", self, 0, "every")
        check_range("checkpoint", self, 1, "keep")


@dataclass
class Run:
    """Everything that one run of the loop works on.

    flops_per_token: forward and backward, for utilisation.
    identity: what a checkpoint must share with this run to be its own, by name.
    publish: writes the HF model to the given directory; a collective, called with the number of steps done.
    fresh_loader: makes the loader from a cursor (None at the beginning).
    held_out_objective: what held-out batches are judged by, where it is not what is trained.
    counts: what a loss is a mean over, as metrics.jsonl calls their number.
    shown: names of what the objective shows beside its loss; of held-out data the perplexity, where it has none.
    base: what frozen weights are from; None where all are trained.
    """

    directory: Path
    runtime: Runtime
    model: nn.Module
    objective: Objective
    optimizer: AdamW
    guard: Guard
    fresh_loader: Callable[[dict[str, Any] | None], Loader]
    held_out: Callable[[], Iterable[MicroBatch]] | None
    learning_rate: Callable[[int], float]
    steps: int
    flops_per_token: float
    identity: dict[str, Any]
    publish: Callable[[Path, int], None]
    held_out_objective: Objective | None = None
    counts: str = "tokens"
    shown: tuple[str, ...] = ()
    base: FrozenBase | None = None

    @property
    def panels(self) -> list[tuple[str, ...]]:
        """What curves.png shows of them: an even count."""
        panels: list[tuple[str, ...]] = [(name, f"held_out_{name}") for name in self.shown]
        return panels if len(panels) % 2 == 0 else [*panels, ("data_wait_share",)]

    def tensors(self) -> dict[str, Tensor | Master]:
        """All state that is tensors, by name; loading fills them in place. Frozen weights are no state."""
        named = {f"model.{name}": master for name, master in self.optimizer.masters()}
        return {**named, **dict(self.optimizer.state()), "guard.state": self.guard.state}


@dataclass
class Progress:
    """All state that is numbers: what a checkpoint's trainer.json holds beside the loader's cursor."""

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None


def train(
    run: Run,
    *,
    checkpoint: CheckpointConfig,
    evaluation: EvalConfig,
    log: LogConfig,
    timeout_seconds: float,
    recipe: Any,
) -> float | None:
    """Train to `run.steps`, from the newest checkpoint if there is one, and publish the model.

    Args:
        timeout_seconds: of a step or a save; one that takes longer ends the process.
        recipe: the resolved configuration, a dataclass, kept beside the model.
    Returns:
        the last held-out loss in nats a token, or None without held-out text.
    Raises:
        DivergedError: the guard refused too many steps.
        StoppedError: a signal arrived on some rank; the state is saved.
        InputError: the checkpoint is of another run, or damaged.
    """
    runtime = run.runtime
    checkpointer = Checkpointer(run.directory, keep=checkpoint.keep, asynchronous=checkpoint.asynchronous)
    progress, loader = _resume(run, checkpointer)
    is_over = progress.step == run.steps
    run_log = RunLog(run.directory, progress.step, log, recipe, (*PANELS, *run.panels), is_over)
    clock = BusyClock(run.model.model.layers, runtime.device)
    desk = _Desk(run, progress, run_log, log, checkpointer)
    last_saved = progress.step
    held_out: float | None = None
    pending: PendingReport | None = None

    with closing(run_log), closing(loader), StopSignals() as signals, Watchdog(timeout_seconds, runtime.name) as dog:
        while True:
            if run.held_out and _is_due(progress.step, evaluation.every, run.steps):
                dog.beat(f"evaluating after step {progress.step}")
                held_out = _evaluate(run, progress, run_log, dog, checkpoint.keep_best)
                desk.speedometer.restart()
            if progress.step == run.steps:
                break

            dog.beat(f"in step {progress.step + 1}")
            tokens_before = loader.cursor["tokens"]
            micro_batches = loader.next_step()
            # Measured two steps ago, so that no step is waited for.
            busy = clock.take() if (progress.step - 2) % log.every == 0 else 0.0
            clock.is_running = progress.step % log.every == 0
            now = train_step(
                run.model,
                run.optimizer,
                run.guard,
                run.objective,
                micro_batches,
                runtime,
                lr=run.learning_rate(progress.step),
                wants_stop=signals.wants_stop,
                busy_seconds=busy and busy + loader.wait_seconds,
            )
            desk.expect(loader.cursor["tokens"] - tokens_before, loader.wait_seconds)
            if pending is not None:
                desk.read(pending)
            pending, progress.step = now, progress.step + 1

            is_save_due = _is_due(progress.step, checkpoint.every, run.steps)
            if is_save_due or desk.must_stop or _is_due(progress.step, evaluation.every, run.steps):
                desk.read(pending)
                pending = None
            if is_save_due or desk.must_stop:
                dog.beat(f"saving after step {progress.step}")
                checkpointer.save(progress.step, run.tensors(), _trainer_state(run, progress, loader))
                last_saved = progress.step
                if progress.step < run.steps:  # else it is drawn below, with the last look at held-out text
                    run_log.draw()
                desk.speedometer.restart()
            if desk.must_stop and progress.step < run.steps:
                dog.beat("finishing the save")
                checkpointer.wait()
                run_log.say(loader.describe())
                raise StoppedError(
                    f"Stopped by a signal; saved after step {progress.step}. The same command goes on from there.",
                    signals.exit_code,
                )

        dog.beat("publishing the model")
        checkpointer.wait()
        assert last_saved == run.steps
        run.publish(run.directory, progress.step)
        run_log.say(loader.describe())
        run_log.draw()
    return held_out


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or bool(every and step % every == 0)


class _Desk:
    """Reads each step's report when it has arrived: logs it, and says when the run must end."""

    def __init__(
        self, run: Run, progress: Progress, run_log: RunLog, log: LogConfig, checkpointer: Checkpointer
    ) -> None:
        runtime = run.runtime
        self._run, self._progress, self._run_log, self._every = run, progress, run_log, log.every
        self._checkpointer = checkpointer
        self._stragglers = Stragglers(runtime.world)
        self._begun: list[tuple[int, float]] = []
        self._read = progress.step
        self.speedometer = Speedometer(run.flops_per_token, peak_flops(runtime.device), runtime.world)
        self.must_stop = False

    def expect(self, tokens: int, data_wait: float) -> None:
        """How many tokens the step just begun reads, and how long it had waited for them."""
        self._begun.append((tokens, data_wait))

    def read(self, pending: PendingReport) -> None:
        """Take in one step's report.

        Raises:
            DivergedError: the guard has given up.
        """
        report = pending.read()
        step = self._read = self._read + 1
        self._progress.tokens += int(report.targets)
        self.must_stop |= report.stop_votes > 0
        speed = self.speedometer.lap(*self._begun.pop(0), pending.finished_at)
        row = {
            "loss": report.loss,
            "lr": self._run.learning_rate(step - 1),
            "grad_norm": report.grad_norm,
            self._run.counts: self._progress.tokens,
            "tokens_per_second": speed.tokens_per_second,
            "mfu": speed.mfu,
            "memory_bytes": peak_memory_bytes(self._run.runtime.device),
            "data_wait_share": speed.data_wait_share,
            "skipped": report.skipped,
            **dict(zip(self._run.shown, report.shown, strict=True)),
        }
        self._run_log.record(step, row)
        if step % self._every == 0 or step in (1, self._run.steps):
            self._run_log.progress(self._line(step, row, report))
        if report.was_skipped:
            self._run_log.say(
                f"step {step} skipped: loss {report.loss:.4g}, gradient norm {report.grad_norm:.4g} "
                f"({report.skipped} skipped so far)."
            )
        if any(report.busy_seconds):
            slow = self._stragglers.look(report.busy_seconds)
            if slow:
                self._run_log.say(slow)
        if self._run.guard.has_given_up(report.skipped, report.skipped_in_a_row):
            self._checkpointer.wait()
            raise DivergedError(
                f"Diverged at step {step}: {report.skipped_in_a_row} steps in a row were refused, {report.skipped} in "
                f"all (last loss {report.loss:.4g}, gradient norm {report.grad_norm:.4g}). Lower --optim.lr or "
                "lengthen --schedule.warmup_ratio; if the leap is meant, raise --guard.loss_leap or --guard.norm_leap. "
                "The last checkpoint is intact."
            )

    def _line(self, step: int, row: dict[str, Any], report: StepReport) -> str:
        speed = self.speedometer.average()
        left = (self._run.steps - step) * speed.seconds_a_step
        parts = [
            f"step {step}/{self._run.steps}",
            f"loss {report.loss:.4f}",
            f"lr {row['lr']:.2e}",
            f"norm {report.grad_norm:.2f}",
            *(f"{name} {value:.4g}" for name, value in zip(self._run.shown, report.shown, strict=True)),
            f"{speed.tokens_per_second:,.0f} tok/s",
            *([f"mfu {speed.mfu:.1%}"] if speed.mfu is not None else []),
            f"mem {row['memory_bytes'] / 2**30:.2f} GiB",
            f"data {speed.data_wait_share:.1%}",
            f"left {timedelta(seconds=round(left))}",
        ]
        return "  ".join(parts)


def _evaluate(run: Run, progress: Progress, run_log: RunLog, dog: Watchdog, keep_best: bool) -> float:
    assert run.held_out is not None
    doing = f"evaluating after step {progress.step}"
    objective = run.held_out_objective or run.objective
    loss, *shown = held_out_means(run.model, objective, run.held_out(), run.runtime, lambda: dog.beat(doing))
    more = {f"held_out_{name}": value for name, value in zip(run.shown, shown, strict=True)}
    said = [f"{name} {value:.4g}" for name, value in zip(run.shown, shown, strict=True)]
    if not run.shown:
        more, said = {"perplexity": perplexity(loss)}, [f"perplexity {perplexity(loss):.2f}"]
    run_log.record(progress.step, {"held_out_loss": loss, **more})
    run_log.say(f"step {progress.step}: held-out loss {loss:.4f}, {', '.join(said)}")
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss = loss
        if keep_best and progress.step:
            dog.beat("publishing the best model so far")
            run.publish(run.directory / "best", progress.step)
    return loss


def _trainer_state(run: Run, progress: Progress, loader: Loader) -> dict[str, Any]:
    base = None if run.base is None else asdict(run.base)
    return {"identity": run.identity, "base": base, "progress": asdict(progress), "cursor": loader.cursor}


def require_same_run(
    directory: Path, saved: Mapping[str, Any], identity: Mapping[str, Any], done: int, asked: int, unit: str
) -> None:
    """See that a checkpoint is of the run that goes on from it.

    Args:
        saved, identity: of the checkpoint and of the run, by name.
        done, asked: steps behind the checkpoint, and those that the run shall have; unit: what they are called.
    Raises:
        InputError: it is of another run, or of a longer one.
    """
    require_same_identity(directory, saved, identity, "its checkpoint was trained")
    if done > asked:
        raise InputError(
            f"{directory}: its checkpoint has {done} {unit} behind it, this command asks for {asked}. Ask for at least "
            "as many, or use --resume never to start over."
        )


def say_resumed(directory: Path, done: int, asked: int, unit: str) -> None:
    """Where a run goes on, and whether anything is left of it; `unit`: what it counts, such as "step"."""
    over = f" {done:,} of {asked:,} {unit}s had been done before: nothing is trained." if done == asked else ""
    speak(f"Resuming {directory} after {unit} {done}.{over}")


def require_same_identity(directory: Path, saved: Mapping[str, Any], identity: Mapping[str, Any], what: str) -> None:
    """See that what a directory holds was made as this run would make it; `what` says of it how it came about.

    Raises:
        InputError: it was not.
    """
    for name, value in identity.items():
        if saved.get(name) != value:
            raise InputError(
                f"{directory}: {what} with {name} {saved.get(name)!r}, this command asks for {value!r}. Use the same "
                "options to go on, another --out for a new run, or --resume never to start over."
            )


def _resume(run: Run, checkpointer: Checkpointer) -> tuple[Progress, Loader]:
    """Fill the run's tensors from the newest checkpoint that all ranks agree on, if there is one."""
    step = checkpointer.latest()
    if step is None:
        return Progress(), run.fresh_loader(None)
    trainer = checkpointer.load(step, run.tensors())
    require_same_run(run.directory, trainer["identity"], run.identity, step, run.steps, "steps")
    require_same_base(run.directory, trainer.get("base"), run.base)
    try:
        loader = run.fresh_loader(trainer["cursor"])
    except InputError as error:
        raise InputError(f"Cannot go on with {run.directory}. {error}") from None
    say_resumed(run.directory, step, run.steps, "step")
    return Progress(**trainer["progress"]), loader
