"""The rejection-sampling job: from options to prompts, a judge and rounds of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine.agreement import ControlGroup
from engine.building import Base, find_trained, make_run_directory
from engine.dry_run import planned_device, planned_world
from engine.files import write_durably
from engine.job import (
    StepShape,
    begin_anew,
    count_parameters,
    plan_alone,
    plan_report,
    require_inputs,
    resolve_precision,
    resolve_shape,
)
from engine.launch import speak
from engine.loggers import keep_recipe
from engine.loop import require_same_identity, say_resumed
from engine.lora import FrozenBase, require_same_base, stand_on
from engine.memory_roles_advice import describe_roles
from engine.mesh import start, stop
from engine.publish import MODEL_COMPLETE
from rlhf.draws import Draws
from rlhf.memory import plan_rejection
from rlhf.ppo_config import RewardConfig
from rlhf.rejection import Rounds
from rlhf.rejection_config import RejectionConfig
from rlhf.rejection_report import describe_gain
from rlhf.sampling_job import SamplingJob, open_sampling
from rlhf.scores import open_scorer

LEARNING_RATE = 1e-5


def rejection(config: RejectionConfig) -> None:
    """Run the whole job: read prompts, go on or begin, then round by round; publish, and say what it has brought.

    Raises:
        InputError: anything the user gave that cannot work, found before the first sample where possible.
        DivergedError, StoppedError: see `engine.loop.train`.
    """
    config.check()
    directory = Path(config.out)
    base = find_trained(config.model, "tools/sft.py", is_planned=config.dry_run)
    if config.dry_run:
        return dry_run(config, base)
    require_inputs(config.data.paths, base, config.eval.data)
    lora = config.lora.spec()
    frozen = None if lora is None else stand_on(base.directory, config.model, config.out)
    runtime = start(config.parallel)
    shape = resolve_shape(config.train, base.config, runtime.world, name=config.model)
    with runtime.main_first():
        if runtime.is_main:
            make_run_directory(directory)
        job = open_sampling(config, base, config.reward, shape, directory)
    recipe = _resolve(config, shape)
    if runtime.is_main:
        speak(describe(recipe, job, runtime.world))
    precision = resolve_precision(config.train, runtime)
    judged_by = RewardConfig(config.reward, clip=0.0, missing_end_penalty=0.0, offload=True)
    scorer = open_scorer(judged_by, job.reward, shape.context, shape.tokens_per_pack, recipe, precision, runtime)
    rollout = job.rollout(precision, keep=True)
    if config.resume == "never":
        begin_anew(directory, runtime)
    ranks = ControlGroup()
    facts = {**job.facts, "prompts": job.prompts.fingerprint, "held_out": job.held_out.fingerprint}
    ranks.first(f"begin in {directory}", lambda: _keep_identity(recipe, facts, frozen))
    texts = (job.tokenizer, job.template, shape.context, job.prompts, job.held_out)
    rounds = Rounds(recipe, runtime, ranks, *texts, rollout, scorer)
    rounds.run()
    if runtime.is_main and len(job.held_out):
        before, after = (Draws(rounds.folder(number) / "held_out.jsonl") for number in (0, config.rounds))
        print(describe_gain(before, after))
    speak(f"Done: {directory} is a model directory.")
    stop()


def dry_run(config: RejectionConfig, base: Base) -> None:
    """Print the memory plan, what a round samples and one prompt to stdout."""
    shape = resolve_shape(config.train, base.config, planned_world(config.plan), name=config.model)
    policy = base.config.with_context(shape.context)
    print(f"sampling and scoring\n{describe_roles(plan_rejection(config, policy, shape), planned_device(config.plan))}")
    print("fine-tuning")
    if base.directory is None and config.tokenizer is None:
        return plan_alone(config, base.config)
    with TemporaryDirectory() as beside:
        job = open_sampling(config, base, None, shape, Path(beside))
        print(plan_report(config, job.model, shape))
        print(describe(_resolve(config, shape), job, planned_world(config.plan)))
        print(f"a prompt as {job.template.name} writes it:\n{job.first_prompt()}")


def describe(config: RejectionConfig, job: SamplingJob, world: int) -> str:
    """What is about to happen, in a few lines."""
    rollout, chosen, prompts = config.rollout, config.select, len(job.prompts)
    asked = min(prompts, rollout.prompts or prompts)
    count = f"{chosen.keep:.0%}" if chosen.by == "fraction" else f"{chosen.keep:,.0f}"
    whose = "all answers" if chosen.by == "top" else "each prompt's answers"
    return (
        f"{count_parameters(job.model, config.lora.spec())}; {prompts:,} prompts to train on, "
        f"{len(job.held_out):,} held out.\n"
        f"{config.rounds} round{'s' if config.rounds > 1 else ''} of {asked:,} prompts x {rollout.samples} answers of "
        f"at most {rollout.max_new_tokens:,} tokens on {world} process{'es' if world > 1 else ''}; kept: the best "
        f"{count} of {whose}{' of all rounds so far' if chosen.earlier_rounds and config.rounds > 1 else ''}. Peak "
        f"learning rate {config.optim.lr:.2e}."
    )


def _resolve(config: RejectionConfig, shape: StepShape) -> RejectionConfig:
    """The recipe with the defaults filled in that all rounds share."""
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, context=shape.context),
        optim=dataclasses.replace(config.optim, lr=config.optim.lr or config.lora.rate(LEARNING_RATE)),
    )


def _keep_identity(config: RejectionConfig, facts: dict[str, Any], frozen: FrozenBase | None) -> None:
    """Write down what decides the samples, or see that it is what an earlier command wrote; and the recipe.

    Args:
        frozen: what adapters stand on.

    Raises:
        InputError: it is something else.
    """
    directory = Path(config.out)
    (directory / "rounds").mkdir(exist_ok=True)
    decisive = {name: getattr(config, name) for name in ("model", "reward", "seed", "begin")}
    for group in ("select", "rollout"):
        decisive |= {f"{group}.{name}": value for name, value in vars(getattr(config, group)).items()}
    asked = json.loads(json.dumps({**facts, **decisive, "lora": config.lora.describe()}))
    kept = directory / "rounds" / "identity.json"
    has_begun = kept.exists()
    is_over = has_begun and (directory / "rounds" / str(config.rounds) / "model" / MODEL_COMPLETE).exists()
    if has_begun:
        saved = json.loads(kept.read_text(encoding="utf-8"))
        require_same_identity(directory, saved, asked, "its samples were drawn")
        require_same_base(directory, saved.get("base"), frozen)
    else:
        base = None if frozen is None else dataclasses.asdict(frozen)
        write_durably(kept, json.dumps({**asked, "base": base}, indent=1, ensure_ascii=False) + "\n")
    if is_over:
        say_resumed(directory, config.rounds, config.rounds, "round")
    keep_recipe(directory, config, has_begun, is_over, "--rounds")
