"""Rejection sampling: draw, judge, choose the best, fine-tune on them, and again (Touvron et al. 2023, section 3.2.3).

Round n is its files, in OUT/rounds/<n>: samples.jsonl, what the model of round n - 1 answered; picks.jsonl and picks/,
what was chosen of it; model/, a whole fine-tuning run on that; held_out.jsonl, what this model answers. Round 0 is the
model to start from. What is there is not done again, so the same command goes on where a run was killed.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.agreement import ControlGroup
from engine.building import find_trained
from engine.conversations import ConversationDataConfig
from engine.data.permutation import Permutation
from engine.data.prepare import prepare
from engine.data.sampled import SampledEncoder, SampledOptions
from engine.files import remove_directory, sync_file, write_durably
from engine.launch import StoppedError, speak
from engine.loop import EvalConfig
from engine.mesh import Runtime
from engine.publish import MODEL_COMPLETE, publish
from engine.sft import SftConfig, fine_tune
from engine.signals import StopSignals
from engine.watchdog import Watchdog
from model.chat import ChatTemplate
from model.errors import InputError
from model.hf import load_config, read_model
from model.sampling import row_seed
from model.tokenizer import Tokenizer
from rlhf.draws import Draws, picked
from rlhf.prompts import Prompts
from rlhf.rejection_config import RejectionConfig
from rlhf.rejection_report import describe_picks, describe_round, other_ids
from rlhf.rollout import Rollout
from rlhf.scores import Scorer
from rlhf.selection import Pool, select
from rlhf.trajectory import Trajectory

# Held-out answers are drawn alike at every look, and not as those of a round.
_HELD_OUT = 0x5EED


@dataclass(frozen=True)
class Rounds:
    """Everything that the rounds work on.

    config: the resolved recipe.
    prompts, held_out: what is answered to be learnt from, and what is only looked at.
    """

    config: RejectionConfig
    runtime: Runtime
    ranks: ControlGroup
    tokenizer: Tokenizer
    template: ChatTemplate
    context: int
    prompts: Prompts
    held_out: Prompts
    rollout: Rollout
    scorer: Scorer

    def run(self) -> None:
        """All rounds, then the finished model in OUT.

        Raises:
            InputError: no answer can be chosen, or too few to fine-tune on.
            DivergedError, StoppedError: see `engine.loop.train`.
        """
        for number in range(1, self.config.rounds + 1):
            self.look(number - 1)
            self.draw(number)
            self.choose(number)
            self.fine_tune(number)
        self.look(self.config.rounds)
        self.rollout.release()
        self.publish()

    def folder(self, number: int) -> Path:
        """Where a round's files are."""
        return Path(self.config.out) / "rounds" / str(number)

    def model(self, number: int) -> Path:
        """The model that a round has made."""
        return self.folder(number) / "model" if number else Path(self.config.model)

    def look(self, number: int) -> None:
        """Have a round's model answer held-out prompts, where that is due."""
        config, folder = self.config, self.folder(number)
        is_due = number in (0, config.rounds) or bool(config.eval.every and number % config.eval.every == 0)
        count = min(len(self.held_out), max(1, config.eval.max_tokens // config.rollout.max_new_tokens))
        if is_due and count:
            self._answer(number, self.held_out, np.arange(count), 1, _HELD_OUT, Draws(folder / "held_out.jsonl"))

    def draw(self, number: int) -> None:
        """Have the latest model answer the round's prompts."""
        rollout, count = self.config.rollout, len(self.prompts)
        asked = np.arange(count)
        if rollout.prompts is not None and rollout.prompts < count:
            order = Permutation(count, self.config.seed, self.prompts.fingerprint)
            asked = np.sort(order(np.arange((number - 1) * rollout.prompts, number * rollout.prompts) % count))
        draws = Draws(self.folder(number) / "samples.jsonl")
        self._answer(number - 1, self.prompts, asked, rollout.samples, number, draws)

    def choose(self, number: int) -> None:
        """Write down the picks of the samples so far, as text to be read and as ids to be trained on."""
        self.ranks.first(f"choose samples in {self.folder(number)}", lambda: self._choose(number))

    def fine_tune(self, number: int) -> None:
        """Train the round's model on its picks."""
        folder, config = self.model(number), self.config
        self.rollout.release()
        if not (folder / MODEL_COMPLETE).exists():
            begin, adapters = self.model(number - 1 if config.begin == "last" else 0), None
            if config.lora.rank and begin != self.model(0):  # the same adapters go on, beside the same weights
                begin, adapters = self.model(0), begin
            names = ("seed", "train", "optim", "schedule", "lora", "guard", "parallel", "checkpoint", "log", "chat")
            job = SftConfig(
                model=str(begin),
                out=str(folder),
                eval=EvalConfig(every=0, fraction=0.0),
                data=ConversationDataConfig(paths=[str(self.folder(number) / "picks")]),
                **{name: getattr(config, name) for name in names},
            )
            base = dataclasses.replace(find_trained(job.model, "tools/sft.py"), adapters=adapters)
            fine_tune(job, base, self.runtime)
            _free()
        # Its training state is many times its size, and of no more use.
        self.ranks.first(f"tidy {folder}", lambda: remove_directory(folder / "state"))

    def publish(self) -> None:
        """The last round's model, in OUT."""
        model = self.model(self.config.rounds)
        marker = json.loads((model / MODEL_COMPLETE).read_text(encoding="utf-8"))

        def copy(directory: Path, _: Iterator[tuple[str, Tensor]]) -> None:
            for name in marker["files"]:
                shutil.copyfile(model / name, directory / name)

        publish(self.config.out, (), copy, self.ranks, step=marker["step"], stage="rejection")

    def _answer(self, policy: int, prompts: Prompts, asked: np.ndarray, samples: int, seed: int, draws: Draws) -> None:
        """Sample and judge what is not yet in the file, chunk by chunk.

        Args:
            policy: whose model answers.
            asked: int64 [N], which prompts.
        """
        options, runtime = self.config.rollout, self.runtime
        chunks = np.array_split(asked, -(-len(asked) // max(1, options.chunk // samples)))
        done = self.ranks.first(f"read {draws.path}", lambda: draws.resume([len(chunk) for chunk in chunks]))
        if done == len(chunks):
            return
        speak(f"The model of round {policy} answers {len(asked):,} prompts, {samples} times each: {draws.path}.")
        weights: Any = _Stored(self.model(policy))
        patience = 60 * self.config.parallel.timeout_minutes
        with Watchdog(patience, runtime.name) as dog, StopSignals() as signals:
            for number, chunk in enumerate(chunks[done:], done + 1):
                beat = functools.partial(dog.beat, f"sampling chunk {number} of {len(chunks)} for {draws.path}")
                beat()
                those = [prompts.prompt(int(index)) for index in chunk]
                own = row_seed(self.config.seed, seed)
                answers = self.rollout.collect(
                    weights, those, samples, options.temperature, options.max_new_tokens, policy, runtime, own, beat
                )
                dog.beat(f"scoring chunk {number} of {len(chunks)} for {draws.path}")
                trajectory = Trajectory.of(answers, runtime.device)
                scores = self.scorer.score(those, answers, trajectory, runtime)[0].tolist()
                if not np.isfinite(scores).all():
                    raise InputError(f"{self.config.reward}: it scored an answer {min(scores)}. Train it again.")
                self.ranks.first(f"write {draws.path}", lambda: draws.append(those, answers, scores))  # noqa: B023
                mean = sum(scores) / len(scores)
                speak(f"chunk {number}/{len(chunks)}  {len(answers):,} answers  mean score {mean:.4f}")
                votes = runtime.sum(torch.tensor(float(signals.wants_stop), device=runtime.device))
                if votes > 0:
                    raise StoppedError(
                        "Stopped by a signal; all samples so far are on disk. The same command goes on from there.",
                        signals.exit_code,
                    )

    def _choose(self, number: int) -> None:
        folder, options = self.folder(number), self.config.select
        report = folder / "picks.json"
        if report.exists():
            return
        rounds = range(1 if options.earlier_rounds else number, number + 1)
        draws = [Draws(self.folder(each) / "samples.jsonl") for each in rounds]
        pools = [each.pool() for each in draws]
        pool = Pool.join(pools)
        chosen = select(pool, options)
        if not len(chosen):
            raise InputError(
                f"{folder}: none of {len(pool.prompt):,} answers ended by itself, so there is nothing to choose. Raise "
                "--rollout.max_new_tokens, or take cut answers too with --select.truncated true."
            )
        picks, beside = folder / "picks.jsonl", folder / ".picks.jsonl.tmp"
        if not picks.exists():
            with open(beside, "w", encoding="utf-8") as file:
                for row in picked(draws, rounds.start, chosen):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            sync_file(beside)
            beside.replace(picks)
        prepare(
            [picks], SampledEncoder(self.template, self.tokenizer, self.context), folder / "picks", SampledOptions()
        )
        facts = describe_round(pools[-1], pool, chosen)
        facts["other_ids"] = other_ids(picks, self.template, self.tokenizer)
        speak(describe_picks(number, facts, picks))
        write_durably(report, json.dumps(facts, indent=1) + "\n")


class _Stored:
    """A model directory in the place of a model: all that a rollout asks of it is its weights."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from read_model(self._directory, load_config(self._directory))


def _free() -> None:
    """A fine-tuning run's tensors hang in cycles: give their memory back before the next sampling."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
