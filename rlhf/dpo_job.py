"""The DPO job: comparisons in, the reference read once, a model that prefers the better answers out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.building import Base, find_trained, make_run_directory, publisher
from engine.data.groups import PreferenceSet
from engine.data.loader import require_a_step
from engine.data.ranked_batch import RankedBatch
from engine.data.ranked_loader import RankedLoader, evaluation_ranked_batches, ranked_packs_per_epoch, require_room
from engine.dry_run import look_at_preferences, planned_world
from engine.guard import Guard
from engine.job import (
    STORED,
    JobConfig,
    StepShape,
    TrainConfig,
    begin_anew,
    describe_run,
    make_model,
    plan_alone,
    plan_report,
    rate_of,
    rate_report,
    resolve_precision,
    resolve_recipe,
    resolve_shape,
)
from engine.launch import speak
from engine.loop import EvalConfig, Run, train
from engine.mesh import Runtime, start, stop
from engine.optim import AdamW, OptimConfig
from engine.preferences import (
    PreferenceDataConfig,
    describe_preferences,
    open_held_out_preferences,
    open_preferences,
)
from engine.schedule import ScheduleConfig
from engine.sft import ChatConfig, read_chat_base
from engine.shard import Precision
from engine.signals import StopSignals
from engine.watchdog import Watchdog
from model.heads import CausalLM
from rlhf.dpo import SHOWN, DpoLossConfig, dpo_objective
from rlhf.reference import reference_key, reference_logprobs
from rlhf.reward_job import show_group

LEARNING_RATE = 5e-7
"""What 7B to 70B took (Ivison et al. 2023, Tunstall et al. 2023): the log-ratio of a whole answer moves fast."""


@dataclass
class DpoConfig(JobConfig):
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
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(fraction=0.05))
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)


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
        return dry_run(config, base)
    runtime = start(config.parallel)
    context = resolve_shape(config.train, base.config, runtime.world).context
    with runtime.main_first():
        if runtime.is_main:
            make_run_directory(directory)
        tokenizer, template, model_config = read_chat_base(base, config.tokenizer, config.chat)
        comparisons = open_preferences(config.data, template, tokenizer, context, directory)
        shape = resolve_shape(config.train, base.config, runtime.world, comparisons.most_tokens)
        comparisons, held_out = open_held_out_preferences(
            comparisons, config.eval.fraction, config.eval.data, config.data, template, tokenizer, context, directory
        )
        require_room(held_out or comparisons, shape.tokens_per_pack)
        require_a_step(comparisons, shape.tokens_per_step)
    model_config = model_config.with_context(context)
    packs = ranked_packs_per_epoch(comparisons, config.seed, shape.tokens_per_pack)
    recipe = _resolve(config, shape, packs)
    assert recipe.train.steps is not None
    if runtime.is_main:
        speak(describe_preferences(comparisons, held_out))
        describe_run(recipe, model_config, shape, runtime, "an answer with its prompt at most")
        speak(f"The chat template is {template.name}. A prompt's answers, compared tokens marked:")
        speak(show_group(comparisons, tokenizer))

    precision = resolve_precision(config.train, runtime)
    model = make_model(CausalLM, model_config, config, base, precision, runtime)
    if config.resume == "never":
        begin_anew(directory, runtime)

    def fresh_loader(cursor: dict[str, Any] | None) -> RankedLoader:
        sizes = (shape.tokens_per_pack, context, shape.packs_per_step)
        return RankedLoader(comparisons, config.seed, *sizes, runtime.rank, runtime.world, cursor)

    def held_out_batches() -> Iterator[RankedBatch]:
        assert held_out is not None
        place = (runtime.rank, runtime.world, config.eval.max_tokens)
        return evaluation_ranked_batches(held_out, shape.tokens_per_pack, context, *place)

    reference = _References(model, recipe, shape, precision, runtime)
    known = reference.of_training(comparisons, fresh_loader, packs)
    held_out_known = reference.of_all(held_out, held_out_batches) if held_out else None
    train(
        Run(
            directory=directory,
            runtime=runtime,
            model=model,
            objective=dpo_objective(config.dpo, known),
            held_out_objective=None if held_out_known is None else dpo_objective(config.dpo, held_out_known),
            optimizer=AdamW(model, recipe.optim),
            guard=Guard(config.guard, runtime.device),
            fresh_loader=fresh_loader,
            held_out=held_out_batches if held_out else None,
            learning_rate=rate_of(recipe),
            steps=recipe.train.steps,
            flops_per_token=model_config.flops_per_token(context),
            identity={
                "stage": "dpo",
                **{f"dpo.{name}": value for name, value in vars(config.dpo).items()},
                "tokenizer": tokenizer.fingerprint,
                "template": f"{template.name} ({template.fingerprint[:8]})",
                "model": config.model,
                **dataclasses.asdict(shape),
            },
            publish=publisher(model, model_config, template.store(tokenizer), "dpo", STORED[precision]),
            counts="prompts",
            shown=SHOWN,
        ),
        checkpoint=config.checkpoint,
        evaluation=config.eval,
        log=config.log,
        timeout_seconds=60 * config.parallel.timeout_minutes,
        recipe=recipe,
    )
    speak(f"Done: {directory} is a model directory.")
    stop()


def dry_run(config: DpoConfig, base: Base) -> None:
    """Print the memory plan, the schedule and the answers to one prompt to stdout."""
    if base.directory is None and config.tokenizer is None:
        return plan_alone(config, base.config, loss="logprob")
    world = planned_world(config.plan)
    context = resolve_shape(config.train, base.config, world).context
    tokenizer, template, model = read_chat_base(base, config.tokenizer, config.chat)
    look, largest = look_at_preferences(config.data, template, tokenizer, context)
    shape = resolve_shape(config.train, base.config, world, largest)
    print(plan_report(config, model, shape, loss="logprob"))
    print(f"data: about {look.tokens:,} tokens, which are read once more for the reference")
    print(rate_report(_resolve(config, shape, math.ceil(look.tokens / shape.tokens_per_pack)), shape))
    print(f"the answers to one prompt as {template.name} writes them, after their grades; what is compared is marked:")
    print(look.sample)


def _resolve(config: DpoConfig, shape: StepShape, packs: int) -> DpoConfig:
    steps = max(1, math.ceil(config.train.epochs * packs / shape.packs_per_step))
    return resolve_recipe(config, shape, steps, LEARNING_RATE)


class _References:
    """Log-probabilities by the model as it is before its first step, kept in OUT/reference."""

    def __init__(
        self, model: nn.Module, recipe: DpoConfig, shape: StepShape, precision: Precision, runtime: Runtime
    ) -> None:
        self._model, self._recipe, self._shape = model, recipe, shape
        self._precision, self._runtime = precision, runtime

    def of_training(
        self, comparisons: PreferenceSet, fresh_loader: Callable[[None], RankedLoader], packs: int
    ) -> Tensor:
        """Of what training reads: fp32 [sequences]. That is what the first epoch has, unless weights leave some of it
        to later ones."""
        count = self._recipe.train.steps
        assert count is not None
        if not any(0 < weight < 1 for weight in comparisons.weights):
            count = min(count, -(-packs // self._shape.packs_per_step))
        with closing(fresh_loader(None)) as loader:
            steps = iter(loader.next_step, None)
            return self._read("train", comparisons, steps, count, self._shape.packs_per_step)

    def of_all(self, held_out: PreferenceSet, batches: Callable[[], Iterator[RankedBatch]]) -> Tensor:
        """Of all that is looked at: fp32 [sequences]."""
        steps = [[batch] for batch in batches()]
        division = (self._recipe.eval.max_tokens, self._runtime.world)
        return self._read("held-out", held_out, iter(steps), len(steps), *division)

    def _read(
        self, name: str, data: PreferenceSet, steps: Iterator[list[RankedBatch]], count: int, *division: int
    ) -> Tensor:
        """
        Args:
            division: what decides which sequences are in the first n steps; what is kept is counted in steps.
        """
        recipe, path = self._recipe, Path(self._recipe.out) / "reference" / f"{name}.safetensors"
        facts = (data.fingerprint, recipe.seed, self._shape.tokens_per_pack, self._precision, recipe.dpo.per_token)
        key = reference_key(Path(recipe.model), *facts, *division)
        patience = 60 * recipe.parallel.timeout_minutes
        with Watchdog(patience, self._runtime.name) as dog, StopSignals() as signals:
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
                recipe.dpo.per_token,
            )
