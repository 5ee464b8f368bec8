"""What jobs on comparisons share: from options to prompts with all their answers, and to a run of the loop on them.

Reward models and DPO differ in the model that is trained, in its objective and in what is known of answers beforehand.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from engine.building import Base, make_run_directory
from engine.data.groups import PreferenceSet
from engine.data.loader import require_a_step
from engine.data.ranked_batch import RankedBatch
from engine.data.ranked_loader import RankedLoader, evaluation_ranked_batches, ranked_packs_per_epoch, require_room
from engine.dry_run import look_at_preferences, planned_world
from engine.guard import Guard
from engine.job import (
    JobConfig,
    StepShape,
    describe_run,
    plan_alone,
    plan_report,
    rate_of,
    rate_report,
    require_inputs,
    resolve_recipe,
    resolve_shape,
)
from engine.launch import speak
from engine.loop import EvalConfig, Run, train
from engine.lora import FrozenBase, stand_on
from engine.memory_heads import Loss
from engine.mesh import Runtime
from engine.optim import AdamW
from engine.preferences import (
    PreferenceDataConfig,
    describe_preferences,
    open_held_out_preferences,
    open_preferences,
)
from engine.preview import show_ids
from engine.sft import ChatConfig, read_chat_base
from engine.step import Objective
from model.chat import ChatTemplate
from model.config import Head, ModelConfig
from model.lora import flops_per_token
from model.tokenizer import Tokenizer


@dataclass
class ComparisonConfig(JobConfig):
    """What a job on comparisons can be told."""

    eval: EvalConfig = field(default_factory=lambda: EvalConfig(fraction=0.05))
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)


@dataclass(frozen=True)
class Comparisons:
    """Comparisons opened for a run, how they are written down, and the steps that they fill.

    recipe: with every default filled in. model: configuration of what is trained. packs: of an epoch.
    frozen: what adapters stand on; None where all weights are trained.
    """

    recipe: ComparisonConfig
    runtime: Runtime
    tokenizer: Tokenizer
    template: ChatTemplate
    model: ModelConfig
    train: PreferenceSet
    held_out: PreferenceSet | None
    shape: StepShape
    packs: int
    frozen: FrozenBase | None

    def loader(self, cursor: dict[str, Any] | None) -> RankedLoader:
        """This rank's steps, from where a cursor stands."""
        sizes = (self.shape.tokens_per_pack, self.shape.context, self.shape.packs_per_step)
        return RankedLoader(self.train, self.recipe.seed, *sizes, self.runtime.rank, self.runtime.world, cursor)

    def held_out_batches(self) -> Iterator[RankedBatch]:
        """This rank's share of a look at held-out comparisons."""
        assert self.held_out is not None
        place = (self.runtime.rank, self.runtime.world, self.recipe.eval.max_tokens)
        return evaluation_ranked_batches(self.held_out, self.shape.tokens_per_pack, self.shape.context, *place)

    def describe(self) -> None:
        """Say what is about to happen."""
        speak(describe_preferences(self.train, self.held_out))
        describe_run(self.recipe, self.model, self.shape, self.runtime, "an answer with its prompt at most")
        speak(f"The chat template is {self.template.name}. A prompt's answers, compared tokens marked:")
        speak(_show_group(self.train, self.tokenizer))


def open_comparisons(
    config: ComparisonConfig, base: Base, lr: float, runtime: Runtime, others: Sequence[str] = ()
) -> Comparisons:
    """Make the run directory, and prepare in it what is not prepared. The model is the base, with the run's context.

    Args:
        lr: peak learning rate of all weights where none is asked for.
        others: paths of what else the job reads.
    Raises:
        InputError: data, template, sizes or directory that cannot work.
    """
    require_inputs(config.data.paths, base, config.eval.data, others)
    directory = Path(config.out)
    frozen = stand_on(base.directory, config.model, config.out) if config.lora.rank else None
    context = resolve_shape(config.train, base.config, runtime.world, name=config.model).context
    with runtime.main_first():
        tokenizer, template, model = read_chat_base(base, config.tokenizer, config.chat)
        if runtime.is_main:
            make_run_directory(directory)
        reading = (config.data, template, tokenizer, context, directory)
        opened = open_preferences(*reading)
        shape = resolve_shape(config.train, base.config, runtime.world, opened.most_tokens, name=config.model)
        opened, held_out = open_held_out_preferences(opened, config.eval.fraction, config.eval.data, *reading)
        require_room(held_out or opened, shape.tokens_per_pack)
        require_a_step(opened, shape.tokens_per_step)
    packs = ranked_packs_per_epoch(opened, config.seed, shape.tokens_per_pack)
    recipe, model = _resolve(config, shape, packs, lr), model.with_context(context)
    return Comparisons(recipe, runtime, tokenizer, template, model, opened, held_out, shape, packs, frozen)


def train_on_comparisons(
    comparisons: Comparisons,
    model: nn.Module,
    objective: Objective[RankedBatch],
    *,
    identity: Mapping[str, Any],
    publish: Callable[[Path, int], None],
    shown: tuple[str, ...],
    held_out_objective: Objective[RankedBatch] | None = None,
) -> None:
    """The loop. See `engine.loop.Run` for what is handed on, and `engine.loop.train` for what is raised."""
    recipe, runtime, shape = comparisons.recipe, comparisons.runtime, comparisons.shape
    assert recipe.train.steps is not None
    template = comparisons.template
    train(
        Run(
            directory=Path(recipe.out),
            runtime=runtime,
            model=model,
            objective=objective,
            held_out_objective=held_out_objective,
            optimizer=AdamW(model, recipe.optim),
            guard=Guard(recipe.guard, runtime.device),
            fresh_loader=comparisons.loader,
            held_out=comparisons.held_out_batches if comparisons.held_out else None,
            learning_rate=rate_of(recipe),
            steps=recipe.train.steps,
            flops_per_token=flops_per_token(comparisons.model, recipe.lora.spec(), shape.context),
            identity={
                **identity,
                "tokenizer": comparisons.tokenizer.fingerprint,
                "template": f"{template.name} ({template.fingerprint[:8]})",
                "lora": recipe.lora.describe(),
                **dataclasses.asdict(shape),
            },
            publish=publish,
            counts="prompts",
            shown=shown,
            base=comparisons.frozen,
        ),
        checkpoint=recipe.checkpoint,
        evaluation=recipe.eval,
        log=recipe.log,
        timeout_seconds=60 * recipe.parallel.timeout_minutes,
        recipe=recipe,
    )


def plan_on_comparisons(
    config: ComparisonConfig, base: Base, lr: float, *, head: Head, loss: Loss, remark: str = ""
) -> None:
    """A dry run: print the memory plan, the schedule and the answers to one prompt to stdout.

    Args:
        head, loss: of what is trained. remark: a line on what else there is, or is not, in memory.
    """
    if base.directory is None and config.tokenizer is None:
        plan_alone(config, dataclasses.replace(base.config, head=head), loss)
        if remark:
            print(remark)
        return
    world = planned_world(config.plan)
    context = resolve_shape(config.train, base.config, world, name=config.model).context
    tokenizer, template, model = read_chat_base(base, config.tokenizer, config.chat)
    look, largest = look_at_preferences(config.data, template, tokenizer, context)
    shape = resolve_shape(config.train, base.config, world, largest, name=config.model)
    print(plan_report(config, dataclasses.replace(model, head=head), shape, loss))
    if remark:
        print(remark)
    print(f"data: about {look.tokens:,} tokens")
    print(rate_report(_resolve(config, shape, math.ceil(look.tokens / shape.tokens_per_pack), lr), shape))
    print(f"the answers to one prompt as {template.name} writes them, after their grades; what is compared is marked:")
    print(look.sample)


def _resolve(config: ComparisonConfig, shape: StepShape, packs: int, lr: float) -> ComparisonConfig:
    steps = max(1, math.ceil(config.train.epochs * packs / shape.packs_per_step))
    return resolve_recipe(config, shape, steps, config.lora.rate(lr))


def _show_group(comparisons: PreferenceSet, tokenizer: Tokenizer) -> str:
    """The best and the worst answer of the first group as the model will see them, for stderr; none is ever cut."""
    group = comparisons.group(int(comparisons.documents()[0]))
    lines = []
    for grade in (max(group.grades), min(group.grades)):
        place = group.grades.index(grade)
        ids, start = group.ids[place].tolist(), group.answer_starts[place]
        is_compared = [position >= start for position in range(len(ids))]
        lines.append(f"{grade:g}: {show_ids(ids, is_compared, tokenizer, stream=sys.stderr)}")
    return "\n".join(lines)
