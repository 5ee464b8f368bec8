"""Continued or fresh pre-training on raw text: prepare, build, train, publish."""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from engine.building import Base, find_base, fit_vocabulary, make_run_directory, publisher
from engine.corpora import (
    NEW_TOKENIZER,
    TOKENIZER,
    DataConfig,
    describe,
    find_tokenizer,
    open_data,
    open_held_out,
    print_baselines,
    train_tokenizer,
)
from engine.data.loader import require_a_step
from engine.dry_run import look_at_data, planned_world
from engine.guard import Guard
from engine.job import (
    STORED,
    JobConfig,
    StepShape,
    begin_anew,
    describe_run,
    held_out_batches,
    loader_maker,
    make_model,
    plan_report,
    rate_of,
    rate_report,
    require_inputs,
    resolve_precision,
    resolve_recipe,
    resolve_shape,
)
from engine.launch import speak
from engine.loop import Run, train
from engine.lora import adapter_rate, stand_on
from engine.mesh import start, stop
from engine.optim import AdamW
from engine.step import next_token_loss
from model.config import PRESETS, ModelConfig
from model.heads import CausalLM
from model.lora import flops_per_token


@dataclass
class PretrainConfig(JobConfig):
    """Pre-train a model on raw text, from fresh or trained weights."""

    model: str = "tiny"
    """preset (tiny, 160m, 1b, 7b, ziya2-13b) or Hugging Face model directory"""
    out: str = "ckpt/pretrain"
    """run directory"""
    tokenizer: str | None = None
    """tokenizer directory; by default the model's own, or one trained on the data"""
    seed: int = 0
    """of fresh weights and of the order of documents"""
    data: DataConfig = field(default_factory=DataConfig)

    takes_fp8 = True

    def reads(self) -> dict[str, str | None]:
        """As in every job; a preset's name is no directory, even where there is one of that name."""
        return {**super().reads(), "--model": None if self.model in PRESETS else self.model}


def default_learning_rate(model: ModelConfig, is_pretrained: bool) -> float:
    """3e-4 at width 4096, falling with the root of the width; a tenth of it on trained weights.

    Llama 2 (Touvron et al. 2023, table 1) used 3e-4 for 7B and 13B; smaller models bear more.
    """
    rate = 3e-4 * math.sqrt(4096 / model.hidden_size)
    return rate / 10 if is_pretrained else rate


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
    require_inputs(config.data.paths, base, config.eval.data)
    lora = config.lora.spec()
    frozen = None if lora is None else stand_on(base.directory, config.model, config.out)
    runtime = start(config.parallel)
    shape = resolve_shape(config.train, base.config, runtime.world, name=config.model)
    with runtime.main_first():
        trained = directory / (TOKENIZER if config.resume == "auto" else NEW_TOKENIZER)
        if runtime.is_main:
            shutil.rmtree(directory / NEW_TOKENIZER, ignore_errors=True)
        tokenizer = find_tokenizer(config.data, config.tokenizer, base, trained)
        model_config = None if tokenizer is None else fit_vocabulary(base, tokenizer)
        if runtime.is_main:
            make_run_directory(directory)
        if tokenizer is None or model_config is None:
            tokenizer = train_tokenizer(config.data, base, trained, config.seed)
            model_config = fit_vocabulary(base, tokenizer)
        documents = open_data(config.data, tokenizer, directory)
        documents, held_out = open_held_out(
            documents, config.eval.fraction, config.eval.data, config.data, tokenizer, directory
        )
        require_a_step(documents, shape.tokens_per_step)
    model_config = model_config.with_context(shape.context)
    recipe = _resolve(config, base, documents.epoch_tokens, shape)
    assert recipe.train.steps is not None
    if runtime.is_main:
        speak(describe(documents, held_out))
        describe_run(recipe, model_config, shape, runtime, "documents cut at")
        everything = held_out_batches(held_out, shape, config.eval.max_tokens, 0, 1)
        if everything is not None:
            print_baselines(documents, everything(), tokenizer.vocab_size)

    precision = resolve_precision(config.train, runtime)
    model = make_model(CausalLM, model_config, config, base, precision, runtime)
    if config.resume == "never":
        begin_anew(directory, runtime, moving_in={NEW_TOKENIZER: TOKENIZER})
    train(
        Run(
            directory=directory,
            runtime=runtime,
            model=model,
            objective=next_token_loss(recipe.optim.z_loss),
            optimizer=AdamW(model, recipe.optim),
            guard=Guard(config.guard, runtime.device),
            fresh_loader=loader_maker(documents, shape, config.seed, runtime),
            held_out=held_out_batches(held_out, shape, config.eval.max_tokens, runtime.rank, runtime.world),
            learning_rate=rate_of(recipe),
            steps=recipe.train.steps,
            flops_per_token=flops_per_token(model_config, lora, shape.context),
            identity={
                "stage": "pretrain",
                "tokenizer": tokenizer.fingerprint,
                "lora": config.lora.describe(),
                **dataclasses.asdict(shape),
            },
            publish=publisher(model, model_config, tokenizer, "pretrain", STORED[precision], lora, base.directory),
            base=frozen,
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
    shape = resolve_shape(config.train, base.config, planned_world(config.plan), name=config.model)
    tokenizer = find_tokenizer(config.data, config.tokenizer, base, Path(config.out) / TOKENIZER)
    model = base.config if tokenizer is None else fit_vocabulary(base, tokenizer)
    look = look_at_data(config.data.paths, config.data, tokenizer, model.vocab_size, shape.context)
    print(plan_report(config, model, shape))
    print(f"data: {'' if look.is_exact else 'about '}{look.tokens:,} tokens")
    print(rate_report(_resolve(config, base, look.tokens, shape), shape))
    print(f"one document, trained tokens marked:\n{look.sample}")


def _resolve(config: PretrainConfig, base: Base, epoch_tokens: int, shape: StepShape) -> PretrainConfig:
    steps = max(1, math.ceil(config.train.epochs * epoch_tokens / shape.tokens_per_step))
    usual = default_learning_rate(base.config, base.is_pretrained)
    rate = adapter_rate(base.config, config.lora) if config.lora.rank else usual
    return resolve_recipe(config, shape, steps, rate)
