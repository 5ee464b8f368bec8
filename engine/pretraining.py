"""Continued or fresh pre-training on raw text: prepare, build, train, publish."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from engine.building import (
    Base,
    fill_from_base,
    find_base,
    fit_vocabulary,
    make_run_directory,
    publisher,
    set_run_aside,
)
from engine.config import check_range
from engine.corpora import (
    NEW_TOKENIZER,
    TOKENIZER,
    DataConfig,
    describe,
    find_tokenizer,
    open_data,
    open_held_out,
    print_baselines,
    resolve_tokenizer,
)
from engine.data.corpus import Corpus
from engine.data.loader import PackLoader, evaluation_batches, require_a_step
from engine.dry_run import PlanConfig, look_at_data, memory_report, planned_world, schedule_report
from engine.guard import Guard, GuardConfig
from engine.launch import speak
from engine.loggers import LogConfig
from engine.loop import CheckpointConfig, EvalConfig, Run, train
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.metrics import MFU_CONVENTION, peak_flops
from engine.optim import AdamW, OptimConfig
from engine.recompute import Recompute
from engine.schedule import ScheduleConfig, learning_rate
from engine.shard import Precision, parallelize
from engine.step import next_token_loss
from model.batch import PackedBatch
from model.config import ModelConfig
from model.errors import InputError
from model.heads import CausalLM


@dataclass
class TrainConfig:
    """Sizes of a step, and how long to train."""

    steps: int | None = None
    """optimizer steps; by default as many as `epochs` needs"""
    epochs: float = 1.0
    """passes over the training documents, where `steps` is not given"""
    context: int | None = None
    """longest document in tokens; by default the model's"""
    micro_batch_tokens: int | None = None
    """tokens of one forward pass (a pack); by default the context, at least 1024"""
    batch_tokens: int | None = None
    """tokens of one optimizer step over all processes; by default 16 times the context"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """compute dtype; weights and reductions stay fp32; auto: bf16 on a GPU, fp32 elsewhere"""
    recompute: Recompute = "none"
    """activation checkpointing"""
    compile: bool = False
    """torch.compile each block"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("train", self, 1, "steps", "micro_batch_tokens", "batch_tokens")
        check_range("train", self, 2, "context")
        if not 0 < self.epochs < math.inf:
            raise InputError(f"--train.epochs is {self.epochs}. Use a number above 0.")


@dataclass(frozen=True)
class StepShape:
    """A step's sizes, resolved."""

    context: int
    tokens_per_pack: int
    packs_per_step: int


def resolve_shape(config: TrainConfig, model: ModelConfig, world: int) -> StepShape:
    """Fill in defaults and check that the sizes fit together.

    Raises:
        InputError: sizes that do not divide, exceed the model, or leave ranks without work.
    """
    context = config.context or model.max_position_embeddings
    pack = config.micro_batch_tokens or max(context, 1024)
    step = config.batch_tokens or max(16 * context, pack)
    model.with_context(context)  # refuses what the positions and their scaling do not reach
    if pack < context:
        raise InputError(
            f"--train.micro_batch_tokens {pack} cannot hold a document of --train.context {context} tokens. "
            "Raise the one or lower the other."
        )
    if step % pack:
        raise InputError(
            f"--train.batch_tokens {step} is no multiple of --train.micro_batch_tokens {pack}. "
            f"Use {max(1, round(step / pack)) * pack}."
        )
    if step // pack < world:
        raise InputError(
            f"A step of {step} tokens holds too few micro-batches of {pack} for {world} processes. "
            f"Raise --train.batch_tokens to {pack * world}, lower --train.micro_batch_tokens, or start fewer processes."
        )
    return StepShape(context, pack, step // pack)


def default_learning_rate(model: ModelConfig, is_pretrained: bool) -> float:
    """3e-4 at width 4096, falling with the root of the width; a tenth of it on trained weights.

    Llama 2 (Touvron et al. 2023, table 1) used 3e-4 for 7B and 13B; smaller models bear more.
    """
    rate = 3e-4 * math.sqrt(4096 / model.hidden_size)
    return rate / 10 if is_pretrained else rate


@dataclass
class PretrainConfig:
    """Pre-train a model on raw text, from fresh or trained weights."""

    model: str = "tiny"
    """preset (tiny, 160m, 1b, 7b, ziya2-13b) or Hugging Face model directory"""
    tokenizer: str | None = None
    """tokenizer directory; by default the model's own, or one trained on the data"""
    out: str = "ckpt/pretrain"
    """run directory"""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint in OUT; never begins again"""
    seed: int = 0
    """of fresh weights and of the order of documents"""
    dry_run: bool = False
    """print the memory plan, the schedule and one decoded sample, and exit"""
    plan: PlanConfig = field(default_factory=PlanConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self) -> None:
        """Raises InputError where a value makes no sense by itself."""
        for group in dataclasses.fields(self):
            if hasattr(options := getattr(self, group.name), "check"):
                options.check()


def pretrain(config: PretrainConfig) -> None:
    """Run the whole job: prepare what is not prepared, resume or begin, train, publish.

    Raises:
        InputError: anything the user gave that cannot work, found before the first step where possible.
        DivergedError, StoppedError: see `engine.loop.train`.
    """
    config.check()
    directory = Path(config.out)
    base = find_base(config.model)
    if config.dry_run:
        return dry_run(config, base)
    runtime = start(config.parallel)
    shape = resolve_shape(config.train, base.config, runtime.world)
    with runtime.main_first():
        trained = directory / (TOKENIZER if config.resume == "auto" else NEW_TOKENIZER)
        if runtime.is_main:
            make_run_directory(directory)
            shutil.rmtree(directory / NEW_TOKENIZER, ignore_errors=True)
        tokenizer = resolve_tokenizer(config.data, config.tokenizer, base, trained, config.seed)
        documents = open_data(config.data, tokenizer, directory)
        documents, held_out = open_held_out(
            documents, config.eval.fraction, config.eval.data, config.data, tokenizer, directory
        )
        require_a_step(documents, shape.packs_per_step * shape.tokens_per_pack)
    model_config = fit_vocabulary(base, tokenizer).with_context(shape.context)
    recipe = resolve_recipe(config, base, documents.epoch_tokens, shape)
    evaluation = _evaluation(held_out, shape, config.eval.max_tokens, runtime.rank, runtime.world)
    if runtime.is_main:
        speak(describe(documents, held_out))
        _describe_run(recipe, model_config, shape, runtime)
        if held_out is not None:
            everything = _evaluation(held_out, shape, config.eval.max_tokens, 0, 1)
            print_baselines(documents, everything(), tokenizer.vocab_size)

    precision = _precision(config, runtime)
    with torch.device("meta"):
        model = CausalLM(model_config)
    parallelize(model, runtime, config.parallel, precision, config.train.recompute, config.train.compile)
    fill_from_base(model, model_config, base, config.seed, runtime)
    if config.resume == "never":
        # Only now that everything else is known to be right, and that every rank has read its tokenizer.
        runtime.wait_for_all()
        if runtime.is_main:
            set_run_aside(directory, moving_in={NEW_TOKENIZER: TOKENIZER})
    assert recipe.optim.lr is not None and recipe.train.steps is not None
    train(
        Run(
            directory=directory,
            runtime=runtime,
            model=model,
            objective=next_token_loss(recipe.optim.z_loss),
            optimizer=AdamW(model, recipe.optim),
            guard=Guard(config.guard, runtime.device),
            fresh_loader=_loader_maker(documents, shape, config.seed, runtime),
            held_out=evaluation if held_out is not None else None,
            learning_rate=functools.partial(
                learning_rate, steps=recipe.train.steps, peak=recipe.optim.lr, config=config.schedule
            ),
            steps=recipe.train.steps,
            flops_per_token=model_config.flops_per_token(shape.context),
            identity={"stage": "pretrain", "tokenizer": tokenizer.fingerprint, **dataclasses.asdict(shape)},
            publish=publisher(model, model_config, tokenizer, "pretrain", _PUBLISHED[precision]),
        ),
        checkpoint=config.checkpoint,
        evaluation=config.eval,
        log=config.log,
        timeout_seconds=60 * config.parallel.timeout_minutes,
        recipe=recipe,
    )
    speak(f"Done: {directory} is a model directory.")
    stop()


def dry_run(config: PretrainConfig, base: Base) -> None:
    """Print the memory plan, the schedule and one document to stdout."""
    shape = resolve_shape(config.train, base.config, planned_world(config.plan))
    tokenizer = find_tokenizer(config.data, config.tokenizer, base, Path(config.out) / TOKENIZER)
    model = base.config if tokenizer is None else fit_vocabulary(base, tokenizer)
    look = look_at_data(config.data.paths, config.data, tokenizer, model.vocab_size, shape.context)
    recipe = resolve_recipe(config, base, look.tokens, shape)
    print(
        f"{config.model}: {model.num_parameters:,} parameters, vocabulary {model.vocab_size:,}, context {shape.context}"
    )
    print(
        memory_report(
            model,
            config.plan,
            **dataclasses.asdict(shape),
            replicas=config.parallel.replicas,
            precision=config.train.precision,
            recompute=config.train.recompute,
            reshard_after_forward=config.parallel.reshard_after_forward,
        )
    )
    print(f"data: {'' if look.is_exact else 'about '}{look.tokens:,} tokens")
    assert recipe.optim.lr is not None and recipe.train.steps is not None
    rate = functools.partial(learning_rate, steps=recipe.train.steps, peak=recipe.optim.lr, config=config.schedule)
    print(schedule_report(recipe.train.steps, shape.tokens_per_pack * shape.packs_per_step, rate))
    print(f"one document, trained tokens marked:\n{look.sample}")


def resolve_recipe(config: PretrainConfig, base: Base, epoch_tokens: int, shape: StepShape) -> PretrainConfig:
    """The recipe with every default filled in, as the run directory keeps it."""
    per_step = shape.tokens_per_pack * shape.packs_per_step
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * epoch_tokens / per_step))
    lr = config.optim.lr or default_learning_rate(base.config, base.is_pretrained)
    train = dataclasses.replace(
        config.train,
        steps=steps,
        context=shape.context,
        micro_batch_tokens=shape.tokens_per_pack,
        batch_tokens=per_step,
    )
    return dataclasses.replace(config, train=train, optim=dataclasses.replace(config.optim, lr=lr))


_PUBLISHED = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _precision(config: PretrainConfig, runtime: Runtime) -> Precision:
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if runtime.device.type == "cuda" else "fp32"


def _loader_maker(
    documents: Corpus, shape: StepShape, seed: int, runtime: Runtime
) -> Callable[[dict[str, Any] | None], PackLoader]:
    def make(cursor: dict[str, Any] | None) -> PackLoader:
        return PackLoader(
            documents,
            seed,
            shape.tokens_per_pack,
            shape.context,
            shape.packs_per_step,
            runtime.rank,
            runtime.world,
            cursor,
        )

    return make


def _evaluation(
    held_out: Corpus | None, shape: StepShape, max_tokens: int, rank: int, world: int
) -> Callable[[], Iterable[PackedBatch]]:
    def batches() -> Iterable[PackedBatch]:
        assert held_out is not None
        return evaluation_batches(held_out, shape.tokens_per_pack, shape.context, rank, world, max_tokens)

    return batches


def _describe_run(recipe: PretrainConfig, model: ModelConfig, shape: StepShape, runtime: Runtime) -> None:
    speak(
        f"{model.num_parameters:,} parameters; {recipe.train.steps:,} steps of {recipe.train.batch_tokens:,} "
        f"tokens ({shape.packs_per_step} packs of {shape.tokens_per_pack:,}, documents cut at {shape.context:,}) on "
        f"{runtime.world} process{'es' if runtime.world > 1 else ''}; peak learning rate {recipe.optim.lr:.2e}."
    )
    if peak_flops(runtime.device) is not None:
        speak(f"MFU is {MFU_CONVENTION}.")
