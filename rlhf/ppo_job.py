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
    describe_model,
    loader_maker,
    resolve_precision,
    resolve_shape,
)
from engine.launch import speak
from engine.memory_roles_advice import describe_roles
from engine.mesh import start, stop
from engine.sft import read_chat_base
from model.chat import ChatTemplate
from model.config import ModelConfig
from model.errors import InputError
from model.tokenizer import Tokenizer
from rlhf.learner import Learner
from rlhf.memory import plan_ppo
from rlhf.ppo import ppo
from rlhf.ppo_config import PpoConfig
from rlhf.prompts import Prompts, PromptStream, open_split_prompts
from rlhf.reward_model import RewardModel, open_reward_model
from rlhf.roles import make_roles
from rlhf.rollout import Rollout
from rlhf.scores import names_function, open_scorer
from rlhf.session import Session

GIB = 2**30


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
    runtime = start(config.parallel)
    shape = ppo_shape(config, base.config, runtime.world)
    with runtime.main_first():
        if runtime.is_main:
            make_run_directory(directory)
        tokenizer, template, model_config, reward = read_bases(config, base)
        prompts, held_out = open_split_prompts(
            config.data, config.eval, config.rollout.max_new_tokens, template, tokenizer, shape.context, directory
        )
        texts = _open_texts(config, template, tokenizer, shape, directory)
    model_config = model_config.with_context(shape.context)
    recipe = resolve(config, shape, len(prompts))
    if runtime.is_main:
        speak(describe_ppo(recipe, model_config, template, len(prompts), len(held_out), runtime.world))
        speak(f"A prompt:\n{show_prompt(prompts, tokenizer)}")

    precision = resolve_precision(config.train, runtime)
    capacity = shape.tokens_per_pack
    rollout = Rollout(
        model_config,
        tokenizer,
        template.end_ids(tokenizer),
        seed=config.seed,
        dtype=STORED[precision],
        context=shape.context,
        rows=config.rollout.rows,
        cache_bytes=None if config.rollout.cache_gib is None else int(config.rollout.cache_gib * GIB),
        keep=config.rollout.keep,
    )
    scorer = open_scorer(config.reward, reward, shape.context, capacity, recipe, precision, runtime)
    roles = make_roles(recipe, base, model_config, tokenizer, template, reward, precision, runtime)
    is_cut = config.ptx.kind == "texts"
    learner = Learner(
        config=recipe,
        runtime=runtime,
        roles=roles,
        rollout=rollout,
        scorer=scorer,
        held_out=held_out.first(max(1, config.eval.max_tokens // config.rollout.max_new_tokens)),
        fresh_prompts=functools.partial(PromptStream, prompts, config.seed),
        fresh_texts=None if texts is None else loader_maker(texts, shape, config.seed, runtime, is_cut),
    )
    if config.resume == "never":
        begin_anew(directory, runtime)
    identity = {
        "stage": "ppo",
        "tokenizer": tokenizer.fingerprint,
        "template": f"{template.name} ({template.fingerprint[:8]})",
        "ppo.advantage": config.ppo.advantage,
        "rollout.temperature": config.rollout.temperature,
        "context": shape.context,
        "seed": config.seed,
        "model": config.model,
        "kl.reference": config.kl.reference,
        "reward.source": config.reward.source,
    }
    publish = publisher(roles.policy.model, model_config, template.store(tokenizer), "ppo", STORED[precision])
    ppo(learner, Session(learner, recipe, identity, publish))
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
    tokenizer, template, model, _ = read_bases(config, base)
    with TemporaryDirectory() as beside:
        longest = config.rollout.max_new_tokens
        prompts, held_out = open_split_prompts(
            config.data, config.eval, longest, template, tokenizer, shape.context, Path(beside)
        )
        recipe = resolve(config, shape, len(prompts))
        print(describe_ppo(recipe, model, template, len(prompts), len(held_out), planned_world(config.plan)))
        print(f"a prompt:\n{show_prompt(prompts, tokenizer)}")


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
    shape = resolve_shape(dataclasses.replace(config.train, batch_tokens=pack * world), model, world)
    return dataclasses.replace(shape, packs_per_step=texts // pack)


def read_bases(config: PpoConfig, base: Base) -> tuple[Tokenizer, ChatTemplate, ModelConfig, RewardModel | None]:
    """Tokenizer, template, the policy's configuration, and the reward model if scores are one's.

    Raises:
        InputError: they do not go together.
    """
    tokenizer, template, model = read_chat_base(base, config.tokenizer, config.chat)
    is_function = names_function(config.reward.source)
    reward = None if is_function else open_reward_model(config.reward.source, tokenizer, template, model.vocab_size)
    return tokenizer, template, model, reward


def resolve(config: PpoConfig, shape: StepShape, prompts: int) -> PpoConfig:
    """The recipe with every default filled in."""
    steps = math.ceil(config.train.epochs * prompts / config.rollout.prompts)
    train = dataclasses.replace(
        config.train,
        steps=config.train.steps or max(1, steps),
        context=shape.context,
        micro_batch_tokens=shape.tokens_per_pack,
    )
    return dataclasses.replace(config, train=train)


def _open_texts(
    config: PpoConfig, template: ChatTemplate, tokenizer: Tokenizer, shape: StepShape, directory: Path
) -> Corpus | None:
    """What the policy goes on reading (PPO-ptx), if anything."""
    ptx = config.ptx
    if not ptx.coef:
        return None
    if ptx.kind == "texts":
        return open_data(DataConfig(paths=ptx.paths), tokenizer, directory)
    return open_conversations(ConversationDataConfig(paths=ptx.paths), template, tokenizer, shape.context, directory)


def describe_ppo(
    recipe: PpoConfig, model: ModelConfig, template: ChatTemplate, prompts: int, held_out: int, world: int
) -> str:
    """What is about to happen, in a few lines."""
    rollout, algorithm = recipe.rollout, recipe.ppo
    return (
        f"{model.num_parameters:,} parameters; {recipe.train.steps:,} iterations of {rollout.prompts:,} prompts, "
        f"{rollout.samples} answer{'s' if rollout.samples > 1 else ''} each of at most {rollout.max_new_tokens:,} "
        f"tokens, on {world} process{'es' if world > 1 else ''}.\n"
        f"Advantage {algorithm.advantage}, {algorithm.epochs} x {algorithm.minibatches} steps an iteration; peak "
        f"learning rate {recipe.optim.lr:.2e}; KL x {recipe.kl.coef:g} in the {recipe.kl.place}.\n"
        f"{prompts:,} prompts to train on, {held_out:,} held out. The chat template is {template.name}."
    )


def show_prompt(prompts: Prompts, tokenizer: Tokenizer) -> str:
    """The first prompt as the policy reads it."""
    return tokenizer.decode(prompts.prompt(0).ids)
