"""What every training job shares: its options, the sizes of a step, and the way from options to a model at work.

A job resolves its options with these, says what it is about to do, and hands a `Run` to `engine.loop.train`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from engine.building import Base, fill_from_base, require_weights, set_run_aside
from engine.config import check_range
from engine.data.corpus import Corpus
from engine.data.loader import PackLoader, evaluation_batches
from engine.data.shards import is_prepared
from engine.data.sources import list_files
from engine.dry_run import PlanConfig, planned_device, planned_setup, planned_world, schedule_report
from engine.fp8 import check_fp8, use_fp8
from engine.guard import GuardConfig
from engine.launch import speak
from engine.loggers import LogConfig
from engine.loop import CheckpointConfig, EvalConfig
from engine.lora import LoraConfig
from engine.memory import Setup, plan
from engine.memory_advice import describe
from engine.memory_heads import Loss
from engine.mesh import ParallelConfig, Runtime
from engine.metrics import MFU_CONVENTION, peak_flops
from engine.optim import OptimConfig
from engine.out_directory import require_apart, require_run
from engine.recompute import Recompute
from engine.schedule import ScheduleConfig, learning_rate
from engine.shard import Precision, parallelize
from model.batch import PackedBatch
from model.config import PRESETS, ModelConfig, parameter_shapes
from model.errors import InputError
from model.lora import LoraSpec, add_lora, is_trained, lora_shapes

STORED = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of a published model, by the precision it was trained in."""


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
    fp8: bool = False
    """products of the blocks in 8 bits, on an H100 or newer; head, norms and attention stay as they are"""
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


@dataclass
class JobConfig:
    """What every job can be told; each adds its own data, and defaults of its own."""

    takes_fp8: ClassVar[bool] = False
    """whether losses with 8-bit products are held to those without; what policies differ by may be too little"""
    model: str
    """Hugging Face model directory"""
    out: str
    """run directory"""
    tokenizer: str | None = None
    """tokenizer directory; by default the model's own"""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint in OUT; never begins again"""
    seed: int = 0
    """of all that is random"""
    dry_run: bool = False
    """print the memory plan, the schedule and one decoded sample, and exit"""
    plan: PlanConfig = field(default_factory=PlanConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def reads(self) -> dict[str, str | None]:
        """Directories that the run reads, by their options; what names none is None, or names nothing that is there."""
        return {"--model": self.model, "--tokenizer": self.tokenizer}

    def check(self) -> None:
        """Raises InputError where a value makes no sense by itself, or --out holds what would be lost."""
        for group in dataclasses.fields(self):
            if hasattr(options := getattr(self, group.name), "check"):
                options.check()
        if self.train.fp8 and not self.takes_fp8:
            raise InputError(
                "--train.fp8 is for pre-training, fine-tuning and reward models: 8 bits are too coarse for what "
                "policies differ by. Leave it out."
            )
        if self.train.fp8 and self.lora.rank:
            raise InputError("--train.fp8 trains all weights, --lora.rank adapters beside them. Leave out one of them.")
        require_apart(self.out, self.reads())
        if self.resume == "auto":
            require_run(self.out)


Config = TypeVar("Config", bound=JobConfig)


@dataclass(frozen=True)
class StepShape:
    """A step's sizes, resolved."""

    context: int
    tokens_per_pack: int
    packs_per_step: int

    @property
    def tokens_per_step(self) -> int:
        return self.tokens_per_pack * self.packs_per_step


def require_inputs(paths: Sequence[str], base: Base, *others: Sequence[str]) -> None:
    """See what can be seen before data is opened, which may take hours, and before a run directory is made.

    Args:
        paths: of the data.
        others: paths of what else is read, such as held-out files, where there is any.
    Raises:
        InputError: there are no paths, nothing that could be read is where one leads, or the base's weights are not
            whole.
    """
    if not paths:
        raise InputError("There is no data. Name files or directories with --data.")
    for given in (paths, *others):
        if raw := [path for path in given if not is_prepared(path)]:
            list_files(raw)
    require_weights(base)


def resolve_shape(
    config: TrainConfig, model: ModelConfig, world: int, largest: int = 0, name: str | None = None
) -> StepShape:
    """Fill in defaults and check that the sizes fit together.

    Args:
        largest: tokens that a micro-batch holds at least where its size is not given, as for a prompt's answers.
        name: of the model, a preset or a directory, for messages.
    Raises:
        InputError: sizes that do not divide, exceed the model, or leave ranks without work.
    """
    context = config.context or model.max_position_embeddings
    pack = config.micro_batch_tokens or max(context, 1024, -(-largest // 64) * 64)
    step = config.batch_tokens or -(-16 * context // pack) * pack
    _require_reach(model, context, name)
    if config.fp8:
        check_fp8(model)
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


def _require_reach(model: ModelConfig, context: int, name: str | None) -> None:
    """Refuse a context that the model's positions and their scaling do not reach."""
    try:
        model.with_context(context)
    except InputError as error:
        if name in PRESETS and dataclasses.replace(model, head=PRESETS[name].head) == PRESETS[name]:
            raise InputError(
                f"--model {name} is a preset of at most {model.max_position_embeddings} tokens, --train.context is "
                f"{context}. Shorten the context, or give --model another preset or a model directory."
            ) from None
        raise InputError(f"{error}" if name is None else f"{name}: {error}") from None


def resolve_recipe(config: Config, shape: StepShape, steps: int, lr: float) -> Config:
    """The recipe with every default filled in, as the run directory keeps it.

    Args:
        steps, lr: what they are where nothing was asked for.
    """
    train = dataclasses.replace(
        config.train,
        steps=config.train.steps or steps,
        context=shape.context,
        micro_batch_tokens=shape.tokens_per_pack,
        batch_tokens=shape.tokens_per_step,
    )
    return dataclasses.replace(config, train=train, optim=dataclasses.replace(config.optim, lr=config.optim.lr or lr))


def rate_of(recipe: JobConfig) -> Callable[[int], float]:
    """The learning rate of each step of a resolved recipe."""
    assert recipe.optim.lr is not None and recipe.train.steps is not None
    return functools.partial(learning_rate, steps=recipe.train.steps, peak=recipe.optim.lr, config=recipe.schedule)


def resolve_precision(config: TrainConfig, runtime: Runtime) -> Precision:
    """What `auto` means here."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if runtime.device.type == "cuda" else "fp32"


def make_model(
    root: type[nn.Module], model: ModelConfig, config: JobConfig, base: Base, precision: Precision, runtime: Runtime
) -> Any:
    """A sharded model, ready to be trained, with its first weights: `root(model)`, with adapters where asked for."""
    lora = config.lora.spec()
    with torch.device("meta"):
        made = root(model)
    if lora is not None:
        add_lora(made, lora, config.seed)
    if config.train.fp8:
        use_fp8(made, runtime.device)
    parallelize(made, runtime, config.parallel, precision, config.train.recompute, config.train.compile)
    fill_from_base(made, model, base, config.seed, runtime, lora)
    return made


def begin_anew(directory: Path, runtime: Runtime, moving_in: Mapping[str, str] | None = None) -> None:
    """Set an earlier run aside, when every rank has read what it needs of it; see `set_run_aside`.

    To be called only when everything else is known to be right.
    """
    runtime.wait_for_all()
    if runtime.is_main:
        set_run_aside(directory, moving_in or {})


def loader_maker(
    documents: Corpus, shape: StepShape, seed: int, runtime: Runtime, allow_split: bool = True
) -> Callable[[dict[str, Any] | None], PackLoader]:
    """A function from a cursor to this rank's loader."""

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
            allow_split,
        )

    return make


def held_out_batches(
    held_out: Corpus | None, shape: StepShape, max_tokens: int, rank: int, world: int
) -> Callable[[], Iterable[PackedBatch]] | None:
    """A function that gives a rank's share of the held-out batches, each time it is called."""
    if held_out is None:
        return None
    return functools.partial(
        evaluation_batches, held_out, shape.tokens_per_pack, shape.context, rank, world, max_tokens
    )


def describe_run(recipe: JobConfig, model: ModelConfig, shape: StepShape, runtime: Runtime, pieces: str) -> None:
    """What is about to happen, in a line; `pieces`: words before the context's length."""
    packs = f"{shape.packs_per_step} pack{'s' if shape.packs_per_step > 1 else ''}"
    speak(
        f"{count_parameters(model, recipe.lora.spec())}; {recipe.train.steps:,} steps of {shape.tokens_per_step:,} "
        f"tokens ({packs} of {shape.tokens_per_pack:,}, {pieces} {shape.context:,}) on "
        f"{runtime.world} process{'es' if runtime.world > 1 else ''}; peak learning rate {recipe.optim.lr:.2e}."
    )
    if peak_flops(runtime.device) is not None:
        speak(f"MFU is {MFU_CONVENTION}.")


def count_parameters(model: ModelConfig, lora: LoraSpec | None) -> str:
    """How many there are, and how many of them are trained, in words."""
    if lora is None:
        return f"{model.num_parameters:,} parameters"
    shapes = parameter_shapes(model) | lora_shapes(model, lora)
    trained = {name: math.prod(shape) for name, shape in shapes.items() if is_trained(name, lora)}
    whole = [name.split(".")[-2] for name in trained if ".lora_" not in name]
    frozen = f"frozen but for {' and '.join(whole)}" if whole else "frozen"
    return (
        f"{model.num_parameters:,} parameters, {frozen}, and adapters of rank {lora.rank}: {sum(trained.values()):,} "
        "are trained"
    )


def planned_step(config: JobConfig, shape: StepShape) -> Setup:
    """How a dry run takes a model to be trained."""
    return planned_setup(
        config.plan,
        **dataclasses.asdict(shape),
        replicas=config.parallel.replicas,
        precision=config.train.precision,
        fp8=config.train.fp8,
        recompute=config.train.recompute,
        reshard_after_forward=config.parallel.reshard_after_forward,
        lora=config.lora.spec(),
    )


def plan_report(config: JobConfig, model: ModelConfig, shape: StepShape, loss: Loss = "cross_entropy") -> str:
    """The head of a dry run: the model, and the memory of a rank."""
    memory = plan(model, dataclasses.replace(planned_step(config, shape), loss=loss))
    return f"{describe_model(config, model, shape)}\n{describe(memory, planned_device(config.plan))}"


def plan_alone(config: JobConfig, model: ModelConfig, loss: Loss = "cross_entropy") -> None:
    """Print all that a dry run can say of a preset without a tokenizer."""
    shape = resolve_shape(config.train, model, planned_world(config.plan), name=config.model)
    print(plan_report(config, model, shape, loss))
    print(f"{config.model} is a preset: with --tokenizer, schedule and a sample of the data are shown, too.")


def describe_model(config: JobConfig, model: ModelConfig, shape: StepShape) -> str:
    """What is trained, in a line."""
    return (
        f"{config.model}: {count_parameters(model, config.lora.spec())}, vocabulary {model.vocab_size:,}, "
        f"context {shape.context}"
    )


def rate_report(recipe: JobConfig, shape: StepShape) -> str:
    """The schedule of a resolved recipe."""
    assert recipe.train.steps is not None
    return schedule_report(recipe.train.steps, shape.tokens_per_step, rate_of(recipe))
