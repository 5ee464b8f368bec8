"""Supervised fine-tuning on conversations: prepare, build, train what the assistant says, publish with the template."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.building import Base, base_tokenizer, find_trained, fit_vocabulary, make_run_directory, publisher
from engine.config import check_range
from engine.conversations import (
    ConversationDataConfig,
    describe_conversations,
    first_whole,
    open_conversations,
    open_held_out_conversations,
)
from engine.data.corpus import Corpus
from engine.data.loader import build_batch, packs_per_epoch, require_a_step
from engine.data.packing import Piece
from engine.dry_run import look_at_conversations, planned_world
from engine.guard import Guard
from engine.job import (
    STORED,
    JobConfig,
    StepShape,
    TrainConfig,
    begin_anew,
    describe_run,
    held_out_batches,
    loader_maker,
    make_model,
    plan_alone,
    plan_report,
    rate_of,
    rate_report,
    require_inputs,
    resolve_precision,
    resolve_recipe,
    resolve_shape,
)
from engine.launch import speak
from engine.loop import EvalConfig, Run, train
from engine.lora import adapter_rate, stand_on
from engine.mesh import Runtime, start, stop
from engine.neftune import neftune
from engine.optim import AdamW, OptimConfig
from engine.preview import show_document
from engine.schedule import ScheduleConfig
from engine.step import next_token_loss
from model.chat import ChatTemplate, resolve_template
from model.config import ModelConfig
from model.heads import CausalLM
from model.lora import flops_per_token
from model.tokenizer import Tokenizer

LEARNING_RATE = 1e-4


@dataclass
class ChatConfig:
    """How conversations are written down."""

    template: str = "auto"
    """auto: the one stored beside the model, chimed where none is; or a name, or a .jinja file"""
    replace: bool = False
    """train the model into another template than the one it stores"""


@dataclass
class SftTrainConfig(TrainConfig):
    """Sizes of a step, how long to train, and with what noise."""

    epochs: float = 2.0
    """passes over the conversations, where `steps` is not given"""
    neftune_alpha: float = 0.0
    """noise on the embeddings while training (NEFTune); its paper takes 5 to 15, 0 is none"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        super().check()
        check_range("train", self, 0, "neftune_alpha")


@dataclass
class SftConfig(JobConfig):
    """Fine-tune a model on conversations; what the assistant says is trained."""

    model: str = "ckpt/pretrain"
    """Hugging Face model directory, such as pre-training leaves"""
    out: str = "ckpt/sft"
    """run directory"""
    seed: int = 0
    """of the order of conversations and of the noise"""
    train: SftTrainConfig = field(default_factory=SftTrainConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(beta2=0.98, weight_decay=1e-4))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(final_ratio=0.0))
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(fraction=0.01))
    data: ConversationDataConfig = field(default_factory=ConversationDataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)

    takes_fp8 = True


def sft(config: SftConfig) -> None:
    """Run the whole job: prepare what is not prepared, resume or begin, train, publish.

    Raises:
        InputError: anything the user gave that cannot work, found before the first step where possible.
        DivergedError, StoppedError: see `engine.loop.train`.
    """
    config.check()
    base = find_trained(config.model, "tools/pretrain.py", is_planned=config.dry_run)
    if config.dry_run:
        return dry_run(config, base)
    fine_tune(config, base, start(config.parallel))
    stop()


def fine_tune(config: SftConfig, base: Base, runtime: Runtime) -> None:
    """The job within a process group, which another job may have formed. Raises as `sft` does."""
    require_inputs(config.data.paths, base, config.eval.data)
    directory = Path(config.out)
    lora = config.lora.spec()
    frozen = None if lora is None else stand_on(base.directory, config.model, config.out)
    shape = resolve_shape(config.train, base.config, runtime.world, name=config.model)
    with runtime.main_first():
        tokenizer, template, model_config = read_chat_base(base, config.tokenizer, config.chat)
        if runtime.is_main:
            make_run_directory(directory)
        documents = open_conversations(config.data, template, tokenizer, shape.context, directory)
        documents, held_out = open_held_out_conversations(
            documents,
            config.eval.fraction,
            config.eval.data,
            config.data,
            template,
            tokenizer,
            shape.context,
            directory,
        )
        require_a_step(documents, shape.tokens_per_step)
    model_config = model_config.with_context(shape.context)
    packs = packs_per_epoch(documents, config.seed, shape.tokens_per_pack, shape.context)
    recipe = _resolve(config, model_config, shape, packs)
    assert recipe.train.steps is not None
    if runtime.is_main:
        speak(describe_conversations(documents, held_out))
        padding = 1 - documents.epoch_tokens / (packs * shape.tokens_per_pack)
        speak(f"An epoch fills {packs:,} packs of {shape.tokens_per_pack:,} tokens with {padding:.2%} padding.")
        describe_run(recipe, model_config, shape, runtime, "conversations of at most")
        speak(f"The chat template is {template.name}. One conversation, trained tokens marked:")
        speak(show_conversation(documents, tokenizer, shape, template.end_ids(tokenizer)))

    precision = resolve_precision(config.train, runtime)
    model = make_model(CausalLM, model_config, config, base, precision, runtime)
    if config.resume == "never":
        begin_anew(directory, runtime)
    alpha, noise = config.train.neftune_alpha, None
    if alpha > 0:
        noise = neftune(alpha, model_config.hidden_size, config.seed, STORED[precision])
    train(
        Run(
            directory=directory,
            runtime=runtime,
            model=model,
            objective=next_token_loss(recipe.optim.z_loss, noise),
            held_out_objective=next_token_loss(),
            optimizer=AdamW(model, recipe.optim),
            guard=Guard(config.guard, runtime.device),
            fresh_loader=loader_maker(documents, shape, config.seed, runtime, allow_split=False),
            held_out=held_out_batches(held_out, shape, config.eval.max_tokens, runtime.rank, runtime.world),
            learning_rate=rate_of(recipe),
            steps=recipe.train.steps,
            flops_per_token=flops_per_token(model_config, lora, shape.context),
            identity={
                "stage": "sft",
                "tokenizer": tokenizer.fingerprint,
                "template": f"{template.name} ({template.fingerprint[:8]})",
                "lora": config.lora.describe(),
                **dataclasses.asdict(shape),
            },
            publish=publisher(
                model, model_config, template.store(tokenizer), "sft", STORED[precision], lora, base.directory
            ),
            base=frozen,
        ),
        checkpoint=config.checkpoint,
        evaluation=config.eval,
        log=config.log,
        timeout_seconds=60 * config.parallel.timeout_minutes,
        recipe=recipe,
    )
    speak(f"Done: {directory} is a model directory.")


def dry_run(config: SftConfig, base: Base) -> None:
    """Print the memory plan, the schedule and one conversation to stdout."""
    if base.directory is None and config.tokenizer is None:
        return plan_alone(config, base.config)
    shape = resolve_shape(config.train, base.config, planned_world(config.plan), name=config.model)
    tokenizer, template, model = read_chat_base(base, config.tokenizer, config.chat)
    look = look_at_conversations(config.data, template, tokenizer, shape.context)
    print(plan_report(config, model, shape))
    print(f"data: {'' if look.is_exact else 'about '}{look.tokens:,} tokens")
    packs = math.ceil(look.tokens / shape.tokens_per_pack)
    print(rate_report(_resolve(config, model, shape, packs), shape))
    print(f"one conversation as {template.name} writes it, trained tokens marked:\n{look.sample}")


def read_chat_base(
    base: Base, tokenizer_directory: str | None, chat: ChatConfig
) -> tuple[Tokenizer, ChatTemplate, ModelConfig]:
    """Tokenizer, template, and the model's configuration, which names all tokens that end an answer."""
    tokenizer = base_tokenizer(base, tokenizer_directory)
    assert tokenizer is not None
    template = resolve_template(chat.template, tokenizer, chat.replace)
    ends = template.end_ids(tokenizer)
    model = fit_vocabulary(base, tokenizer)
    return tokenizer, template, dataclasses.replace(model, eos_token_id=ends if len(ends) > 1 else ends[0])


def _resolve(config: SftConfig, model: ModelConfig, shape: StepShape, packs: int) -> SftConfig:
    steps = max(1, math.ceil(config.train.epochs * packs / shape.packs_per_step))
    return resolve_recipe(config, shape, steps, adapter_rate(model, config.lora) if config.lora.rank else LEARNING_RATE)


def show_conversation(documents: Corpus, tokenizer: Tokenizer, shape: StepShape, ends: Sequence[int]) -> str:
    """The first whole conversation as the model will see it, for stderr; `ends`: ids that end an answer."""
    first = first_whole(documents, ends)
    length = len(documents.read(first))
    batch = build_batch(documents, [Piece(0, first, 0, length)], shape.tokens_per_pack, shape.context)
    return show_document(batch, tokenizer, stream=sys.stderr)
