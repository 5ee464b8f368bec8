"""The reward-model job: comparisons in; out comes a model that gives a number for an answer, and how good it is."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.building import Base, find_trained, make_run_directory, publisher
from engine.config import check_range
from engine.data.groups import PreferenceSet
from engine.data.loader import require_a_step
from engine.data.ranked_loader import RankedLoader, ranked_packs_per_epoch, require_room
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
from engine.preview import show_ids
from engine.schedule import ScheduleConfig
from engine.sft import ChatConfig, read_chat_base
from model.chat import ChatTemplate
from model.config import ModelConfig
from model.errors import InputError
from model.heads import ScalarModel
from model.tokenizer import Tokenizer
from rlhf.ranking_loss import RankingLoss
from rlhf.reward_model import SHOWN, ranking_objective
from rlhf.reward_report import measure, summary, write_report
from rlhf.reward_scores import HeldOut, NormaliseConfig

LEARNING_RATE = 1e-5
"""Of Llama 2's reward models up to 34B (Touvron et al. 2023, section 3.2.2); InstructGPT's 6B took 9e-6."""


@dataclass
class LossConfig:
    """What is minimised over the answers to a prompt."""

    kind: RankingLoss = "pairwise"
    """pairwise: all pairs (Bradley-Terry); plackett_luce: the whole order; best: the best against the others"""
    margin: float = 0.0
    """by how much scores shall differ for each unit of difference between grades (Llama 2); 0 is none"""
    centre: float = 0.0
    """weight of the squared sum of two scores, which keeps them around 0; 0.01 is usual, 0 is none"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("loss", self, 0, "margin", "centre")


@dataclass
class RmConfig(JobConfig):
    """Train a reward model on comparisons of answers."""

    model: str = "ckpt/sft"
    """Hugging Face model directory, such as fine-tuning leaves; or a reward model, to go on from"""
    out: str = "ckpt/rm"
    """run directory"""
    seed: int = 0
    """of the order of comparisons and of the first reward head"""
    loss: LossConfig = field(default_factory=LossConfig)
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup_ratio=0.03))
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(fraction=0.05))
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)

    def check(self) -> None:
        """Raises InputError where a value makes no sense by itself, or nothing is left to normalise by."""
        super().check()
        if not (self.eval.fraction or self.eval.data or self.normalise.data):
            raise InputError(
                "With --eval.fraction 0 there are no held-out answers to normalise scores by. Give --normalise.data "
                "conversations, or --eval.data comparisons."
            )


def rm(config: RmConfig) -> None:
    """Run the whole job: prepare what is not prepared, resume or begin, train, normalise, publish, report.

    Raises:
        InputError: anything the user gave that cannot work, found before the first step where possible; or a trained
            model that gives all answers one score.
        DivergedError, StoppedError: see `engine.loop.train`.
    """
    config.check()
    directory = Path(config.out)
    base = find_trained(config.model, "tools/sft.py", head=None, is_planned=config.dry_run)
    if config.dry_run:
        return dry_run(config, base)
    runtime = start(config.parallel)
    context = resolve_shape(config.train, base.config, runtime.world).context
    with runtime.main_first():
        if runtime.is_main:
            make_run_directory(directory)
        tokenizer, template, model_config = _read_base(config, base)
        comparisons = open_preferences(config.data, template, tokenizer, context, directory)
        shape = resolve_shape(config.train, base.config, runtime.world, comparisons.most_tokens)
        comparisons, held_out = open_held_out_preferences(
            comparisons, config.eval.fraction, config.eval.data, config.data, template, tokenizer, context, directory
        )
        require_room(held_out or comparisons, shape.tokens_per_pack)
        require_a_step(comparisons, shape.tokens_per_step)
        answers = config.normalise.open(template, tokenizer, context, directory)
    model_config = model_config.with_context(context)
    recipe = _resolve(config, shape, ranked_packs_per_epoch(comparisons, config.seed, shape.tokens_per_pack))
    assert recipe.train.steps is not None
    if runtime.is_main:
        speak(describe_preferences(comparisons, held_out))
        describe_run(recipe, model_config, shape, runtime, "an answer with its prompt at most")
        speak(f"The chat template is {template.name}. A prompt's answers, compared tokens marked:")
        speak(show_group(comparisons, tokenizer))

    precision = resolve_precision(config.train, runtime)
    model = make_model(ScalarModel, model_config, config, base, precision, runtime)
    ends = template.end_ids(tokenizer)
    judge = HeldOut(model, held_out, answers, ends, shape, runtime, config.eval.max_tokens)
    if config.resume == "never":
        begin_anew(directory, runtime)
    train(
        Run(
            directory=directory,
            runtime=runtime,
            model=model,
            objective=ranking_objective(**vars(config.loss)),
            optimizer=AdamW(model, recipe.optim),
            guard=Guard(config.guard, runtime.device),
            fresh_loader=functools.partial(_loader, comparisons, config.seed, shape, runtime),
            held_out=judge.batches if held_out else None,
            learning_rate=rate_of(recipe),
            steps=recipe.train.steps,
            flops_per_token=model_config.flops_per_token(context),
            identity={
                "stage": "rm",
                "loss": config.loss.kind,
                "tokenizer": tokenizer.fingerprint,
                "template": f"{template.name} ({template.fingerprint[:8]})",
                **dataclasses.asdict(shape),
            },
            publish=publisher(
                model, lambda: judge.normalised(model_config), template.store(tokenizer), "rm", STORED[precision]
            ),
            counts="prompts",
            shown=SHOWN,
        ),
        checkpoint=config.checkpoint,
        evaluation=config.eval,
        log=config.log,
        timeout_seconds=60 * config.parallel.timeout_minutes,
        recipe=recipe,
    )
    if runtime.is_main:
        figures = measure(judge.judged)
        write_report(directory, figures)
        print(summary(figures))
    speak(f"Done: {directory} is a reward model; its report.md says how good it is.")
    stop()


def dry_run(config: RmConfig, base: Base) -> None:
    """Print the memory plan, the schedule and the answers to one prompt to stdout."""
    if base.directory is None and config.tokenizer is None:
        return plan_alone(config, dataclasses.replace(base.config, head="score"))
    world = planned_world(config.plan)
    context = resolve_shape(config.train, base.config, world).context
    tokenizer, template, model = _read_base(config, base)
    look, largest = look_at_preferences(config.data, template, tokenizer, context)
    shape = resolve_shape(config.train, base.config, world, largest)
    print(plan_report(config, model, shape))
    print(f"data: about {look.tokens:,} tokens")
    packs = math.ceil(look.tokens / shape.tokens_per_pack)
    print(rate_report(_resolve(config, shape, packs), shape))
    print(f"the answers to one prompt as {template.name} writes them, after their grades; what is compared is marked:")
    print(look.sample)


def _read_base(config: RmConfig, base: Base) -> tuple[Tokenizer, ChatTemplate, ModelConfig]:
    """Tokenizer and template of the base, and the configuration of a reward model on it."""
    tokenizer, template, model = read_chat_base(base, config.tokenizer, config.chat)
    padding = padding_id(tokenizer, template.end_ids(tokenizer))
    scoring = dataclasses.replace(model, head="score", score_mean=None, score_std=None, pad_token_id=padding)
    return tokenizer, template, scoring


def padding_id(tokenizer: Tokenizer, ends: Sequence[int]) -> int:
    """What fills up batches in transformers, whose classifiers read the score at the last token that is another.

    So it is none that ends an answer: where the tokenizer pads with its end token, it is one that no text ends with.
    """
    named = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, *range(tokenizer.vocab_size))
    return next(token for token in named if token is not None and token not in ends)


def _resolve(config: RmConfig, shape: StepShape, packs: int) -> RmConfig:
    steps = max(1, math.ceil(config.train.epochs * packs / shape.packs_per_step))
    return resolve_recipe(config, shape, steps, LEARNING_RATE)


def _loader(
    comparisons: PreferenceSet, seed: int, shape: StepShape, runtime: Runtime, cursor: dict[str, Any] | None
) -> RankedLoader:
    sizes = (shape.tokens_per_pack, shape.context, shape.packs_per_step)
    return RankedLoader(comparisons, seed, *sizes, runtime.rank, runtime.world, cursor)


def show_group(comparisons: PreferenceSet, tokenizer: Tokenizer) -> str:
    """The best and the worst answer of the first group as the model will see them, for stderr."""
    group = comparisons.group(int(comparisons.documents()[0]))
    lines = []
    for grade in (max(group.grades), min(group.grades)):
        place = group.grades.index(grade)
        ids, start = group.ids[place].tolist(), group.answer_starts[place]
        is_compared = [position >= start for position in range(len(ids))]
        lines.append(f"{grade:g}: {show_ids(ids, is_compared, tokenizer, stream=sys.stderr)}")
    return "\n".join(lines)
