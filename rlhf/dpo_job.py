"""The DPO job: comparisons in, the reference read once, a model that prefers the better answers out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from engine.building import find_trained, publisher
from engine.data.groups import PreferenceSet
from engine.data.ranked_batch import RankedBatch
from engine.job import STORED, TrainConfig, begin_anew, make_model, resolve_precision
from engine.launch import speak
from engine.mesh import start, stop
from engine.optim import OptimConfig
from engine.schedule import ScheduleConfig
from engine.shard import Precision
from engine.signals import StopSignals
from engine.watchdog import Watchdog
from model.heads import CausalLM
from model.lora import adapters_off
from rlhf.comparison_job import (
    ComparisonConfig,
    Comparisons,
    open_comparisons,
    plan_on_comparisons,
    train_on_comparisons,
)
from rlhf.dpo import SHOWN, DpoLossConfig, dpo_objective
from rlhf.reference import reference_key, reference_logprobs

LEARNING_RATE = 5e-7
"""What 7B to 70B took (Ivison et al. 2023, Tunstall et al. 2023): the log-ratio of a whole answer moves fast."""


@dataclass
class DpoConfig(ComparisonConfig):
    """Improve a fine-tuned model by comparisons of answers, without a reward model."""

    model: str = "ckpt/sft"
    """Hugging Face model directory, such as fine-tuning leaves; also the reference"""
    out: str = "ckpt/dpo"
    """run directory"""
    seed: int = 0
    """of the order of comparisons"""
    dpo: DpoLossConfig = field(default_factory=DpoLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(beta2=0.999, weight_decay=0.0))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="linear", warmup_ratio=0.1, final_ratio=0.0)
    )


def dpo(config: DpoConfig) -> None:
    """Run the whole job: prepare what is not prepared, read the reference, resume or begin, train, publish.

    Raises:
        InputError: anything the user gave that cannot work, found before the first step where possible.
        DivergedError, StoppedError: see `engine.loop.train`.
    """
    config.check()
    directory = Path(config.out)
    base = find_trained(config.model, "tools/sft.py", is_planned=config.dry_run)
    if config.dry_run:
        reader = "the same weights, adapters off, read" if config.lora.rank else "the model itself reads"
        remark = f"The reference is no second model: {reader} all comparisons once before the first step."
        return plan_on_comparisons(config, base, LEARNING_RATE, head="lm", loss="logprob", remark=remark)
    runtime = start(config.parallel)
    comparisons = open_comparisons(config, base, LEARNING_RATE, runtime)
    if runtime.is_main:
        comparisons.describe()

    precision = resolve_precision(config.train, runtime)
    model = make_model(CausalLM, comparisons.model, config, base, precision, runtime)
    if config.resume == "never":
        begin_anew(directory, runtime)
    reference = _References(model, config, comparisons, precision)
    known = reference.of_training()
    held_out_known = reference.of_held_out() if comparisons.held_out else None
    template = comparisons.template.store(comparisons.tokenizer)
    train_on_comparisons(
        comparisons,
        model,
        dpo_objective(config.dpo, known),
        held_out_objective=None if held_out_known is None else dpo_objective(config.dpo, held_out_known),
        identity={
            "stage": "dpo",
            **{f"dpo.{name}": value for name, value in vars(config.dpo).items()},
            # What adapters stand on is known by its weights, wherever they lie.
            "model": None if config.lora.rank else config.model,
        },
        publish=publisher(
            model, comparisons.model, template, "dpo", STORED[precision], config.lora.spec(), base.directory
        ),
        shown=SHOWN,
    )
    speak(f"Done: {directory} is a model directory.")
    stop()


class _References:
    """Log-probabilities by the model as it is before its first step, its adapters off, kept in OUT/reference."""

    def __init__(self, model: nn.Module, config: DpoConfig, comparisons: Comparisons, precision: Precision) -> None:
        self._model, self._config, self._comparisons = model, config, comparisons
        self._shape, self._precision, self._runtime = comparisons.shape, precision, comparisons.runtime

    def of_training(self) -> Tensor:
        """Of what training reads: fp32 [sequences]. That is what the first epoch has, unless weights leave some of it
        to later ones."""
        comparisons = self._comparisons
        count = comparisons.recipe.train.steps
        assert count is not None
        if not any(0 < weight < 1 for weight in comparisons.train.weights):
            count = min(count, -(-comparisons.packs // self._shape.packs_per_step))
        with closing(comparisons.loader(None)) as loader:
            steps = iter(loader.next_step, None)
            return self._read("train", comparisons.train, steps, count, self._shape.packs_per_step)

    def of_held_out(self) -> Tensor:
        """Of all that is looked at: fp32 [sequences]."""
        assert self._comparisons.held_out is not None
        steps = [[batch] for batch in self._comparisons.held_out_batches()]
        division = (self._config.eval.max_tokens, self._runtime.world)
        return self._read("held-out", self._comparisons.held_out, iter(steps), len(steps), *division)

    def _read(
        self, name: str, data: PreferenceSet, steps: Iterator[list[RankedBatch]], count: int, *division: int
    ) -> Tensor:
        """
        Args:
            division: what decides which sequences are in the first n steps; what is kept is counted in steps.
        """
        config, path = self._config, Path(self._config.out) / "reference" / f"{name}.safetensors"
        facts = (data.fingerprint, config.seed, self._shape.tokens_per_pack, self._precision, config.dpo.per_token)
        key = reference_key(Path(config.model), *facts, *division)
        patience = 60 * config.parallel.timeout_minutes
        with adapters_off(self._model), Watchdog(patience, self._runtime.name) as dog, StopSignals() as signals:
            return reference_logprobs(
                self._model,
                steps,
                count,
                data.num_sequences,
                path,
                key,
                self._runtime,
                dog,
                signals,
                config.dpo.per_token,
            )
