"""The job: from options to prompts, reward and roles, then the loop."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.building import Base, find_trained, make_run_directory, publisher
from engine.conversations import ConversationDataConfig, open_conversations
from engine.corpora import DataConfig, open_data
from engine.data.corpus import Corpus
from engine.dry_run import planned_device, planned_world
from engine.job import (
    STORED,
    StepShape,
    begin_anew,
    count_parameters,
    describe_model,
    loader_maker,
    require_inputs,
    resolve_precision,
    resolve_shape,
)
from engine.launch import speak
from engine.lora import stand_on
from engine.memory_roles_advice import describe_roles
from engine.mesh import start, stop
from model.config import ModelConfig
from model.errors import InputError
from rlhf.learner import Learner
from rlhf.memory import plan_ppo
from rlhf.ppo import ppo
from rlhf.ppo_config import PpoConfig
from rlhf.prompts import PromptStream
from rlhf.roles import make_roles
from rlhf.sampling_job import SamplingJob, open_sampling
from rlhf.scores import open_scorer
from rlhf.session import Session


def train_ppo(config: PpoConfig) -> None:
    """Run the whole job: read prompts, resume or begin, train, publish.

    Raises:
        InputError: anything the user gave that cannot work, found before the first iteration where possible.
        DivergedError, StoppedError: see `rlhf.ppo.ppo`.
    """
    config.check()
    directory = Path(config.out)
    base = find_trained(config.model, "tools/sft.py", is_planned=config.dry_run)
    if config.dry_run:
        return dry_run(config, base)
    require_inputs(config.data.paths, base, config.eval.data, config.ptx.paths)
    lora = config.lora.spec()
    bases = {} if lora is None else {"--model": stand_on(base.directory, config.model, config.out)}
    runtime = start(config.parallel)
    shape = ppo_shape(config, base.config, runtime.world)
    with runtime.main_first():
        if runtime.is_main:
            make_run_directory(directory)
        job = open_sampling(config, base, config.reward.source, shape, directory)
        texts = _open_texts(config, job)
    recipe = resolve(config, shape, len(job.prompts))
    if runtime.is_main:
        speak(describe_ppo(recipe, job, runtime.world))
        speak(f"A prompt:\n{job.first_prompt()}")

    precision = resolve_precision(config.train, runtime)
    rollout = job.rollout(precision, config.rollout.keep)
    scorer = open_scorer(config.reward, job.reward, shape.context, shape.tokens_per_pack, recipe, precision, runtime)
    roles = make_roles(recipe, base, job.model, job.tokenizer, job.template, job.reward, precision, runtime)
    if lora is not None and roles.critic_base is not None:
        directory_of = roles.critic_base.directory
        bases["--value.model"] = stand_on(directory_of, str(directory_of), config.out)
    is_cut = config.ptx.kind == "texts"
    learner = Learner(
        config=recipe,
        runtime=runtime,
        roles=roles,
        rollout=rollout,
        scorer=scorer,
        held_out=job.held_out.first(max(1, config.eval.max_tokens // config.rollout.max_new_tokens)),
        fresh_prompts=functools.partial(PromptStream, job.prompts, config.seed),
        fresh_texts=None if texts is None else loader_maker(texts, shape, config.seed, runtime, is_cut),
    )
    if config.resume == "never":
        begin_anew(directory, runtime)
    identity = {
        "stage": "ppo",
        **job.facts,
        "ppo.advantage": config.ppo.advantage,
        "rollout.temperature": config.rollout.temperature,
        "seed": config.seed,
        # What adapters stand on is known by its weights, wherever they lie.
        "model": None if config.lora.rank else config.model,
        "lora": config.lora.describe(),
        "kl.reference": config.kl.reference,
        "reward.source": config.reward.source,
    }
    publish = publisher(
        roles.policy.model,
        job.model,
        job.template.store(job.tokenizer),
        "ppo",
        STORED[precision],
        lora,
        base.directory,
    )
    ppo(learner, Session(learner, recipe, identity, publish, bases))
    speak(f"Done: {directory} is a model directory.")
    stop()


def dry_run(config: PpoConfig, base: Base) -> None:
    """Print the memory plan, the iterations and one prompt to stdout."""
    shape = ppo_shape(config, base.config, planned_world(config.plan))
    policy = base.config.with_context(shape.context)
    print(describe_model(config, policy, shape))
    print(describe_roles(plan_ppo(config, policy, shape), planned_device(config.plan)))
    if base.directory is None and config.tokenizer is None:
        print(f"{config.model} is a preset: with --tokenizer, iterations and a prompt are shown, too.")
        return
    with TemporaryDirectory() as beside:
        job = open_sampling(config, base, config.reward.source, shape, Path(beside))
        print(describe_ppo(resolve(config, shape, len(job.prompts)), job, planned_world(config.plan)))
        print(f"a prompt:\n{job.first_prompt()}")


def ppo_shape(config: PpoConfig, model: ModelConfig, world: int) -> StepShape:
    """Context, tokens of a micro-batch, and packs of pre-training text for each step of the policy.

    Raises:
        InputError: sizes that do not fit together, or exceed the model.
    """
    context = config.train.context or model.max_position_embeddings
    pack = config.train.micro_batch_tokens or max(context, 1024)
    texts = config.ptx.batch_tokens or pack * world
    if texts % pack:
        raise InputError(
            f"--ptx.batch_tokens {texts} is no multiple of --train.micro_batch_tokens {pack}. Use "
            f"{max(1, round(texts / pack)) * pack}."
        )
    shape = resolve_shape(dataclasses.replace(config.train, batch_tokens=pack * world), model, world, name=config.model)
    return dataclasses.replace(shape, packs_per_step=texts // pack)


def resolve(config: PpoConfig, shape: StepShape, prompts: int) -> PpoConfig:
    """The recipe with every default filled in."""
    steps = math.ceil(config.train.epochs * prompts / config.rollout.prompts)
    train = dataclasses.replace(
        config.train,
        steps=config.train.steps or max(1, steps),
        context=shape.context,
        micro_batch_tokens=shape.tokens_per_pack,
    )
    return dataclasses.replace(config.with_rates(), train=train)


def _open_texts(config: PpoConfig, job: SamplingJob) -> Corpus | None:
    """What the policy goes on reading (PPO-ptx), if anything."""
    ptx, directory = config.ptx, Path(config.out)
    if not ptx.coef:
        return None
    if ptx.kind == "texts":
        return open_data(DataConfig(paths=ptx.paths), job.tokenizer, directory)
    conversations = ConversationDataConfig(paths=ptx.paths)
    return open_conversations(conversations, job.template, job.tokenizer, job.shape.context, directory)


def describe_ppo(recipe: PpoConfig, job: SamplingJob, world: int) -> str:
    """What is about to happen, in a few lines."""
    rollout, algorithm = recipe.rollout, recipe.ppo
    return (
        f"{count_parameters(job.model, recipe.lora.spec())}; {recipe.train.steps:,} iterations of "
        f"{rollout.prompts:,} prompts, {rollout.samples} answer{'s' if rollout.samples > 1 else ''} each of at most "
        f"{rollout.max_new_tokens:,} tokens, on {world} process{'es' if world > 1 else ''}.\n"
        f"Advantage {algorithm.advantage}, {algorithm.epochs} x {algorithm.minibatches} steps an iteration; peak "
        f"learning rate {recipe.optim.lr:.2e}; KL x {recipe.kl.coef:g} in the {recipe.kl.place}"
        f"{', from the policy without its adapters' if recipe.reference_is_policy else ''}.\n"
        f"{len(job.prompts):,} prompts to train on, {len(job.held_out):,} held out. The chat template is "
        f"{job.template.name}."
    )
