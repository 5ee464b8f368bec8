"""Who races in `bench_ppo`: an iteration of this engine, and one of TRL's GRPO trainer, on the same load."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from engine.benchmark import now
from engine.building import Base
from engine.mesh import Runtime
from engine.optim import OptimConfig
from engine.schedule import ScheduleConfig
from engine.shard import Precision
from model.chat import ChatTemplate
from model.config import ModelConfig, parameter_shapes
from model.errors import InputError
from model.hf import load_config, write_model
from model.init import initial_value
from model.tokenizer import Tokenizer
from rlhf.learner import Learner
from rlhf.ppo_config import AlgorithmConfig, KlConfig, PpoConfig, PpoTrainConfig, RolloutConfig
from rlhf.prompts import Prompt, PromptStream
from rlhf.roles import make_roles
from rlhf.rollout import Rollout
from rlhf.scores import Scorer
from rlhf.trajectory import Sample

# One character is one token: on a plane of Unicode of which no tokenizer's rules speak.
_FIRST_CHARACTER = 0x20000
_SPECIAL = ("<pad>", "<s>", "</s>")


@dataclass
class Load:
    """What an iteration is made of."""

    prompts: int = 8
    """prompts an iteration"""
    samples: int = 4
    """answers to each"""
    median_prompt: int = 64
    """of prompts in tokens, whose lengths are lognormal: half are shorter"""
    spread: float = 0.6
    """standard deviation of the logarithm of prompts' lengths"""
    longest_prompt: int = 160
    """prompts are clipped to 8 and this"""
    longest_answer: int = 192
    """answers are cut there"""
    mean_answer: int = 64
    """of answers in tokens, if nothing cut them; 0 lets nothing end them"""
    epochs: int = 2
    """passes over an iteration's answers"""
    minibatches: int = 1
    """optimizer steps a pass"""
    kl: float = 0.05
    """weight of the divergence from the reference; 0 loads none"""
    seed: int = 0
    """of weights, prompts and answers"""

    @property
    def answers(self) -> int:
        return self.prompts * self.samples

    def stop_ids(self, vocab_size: int) -> list[int]:
        """Tokens that end an answer: so many that one of nearly uniform draws hits them once in `mean_answer`."""
        if not self.mean_answer:
            return []
        return [_SPECIAL.index("</s>"), *range(len(_SPECIAL), len(_SPECIAL) + vocab_size // self.mean_answer)]

    def texts(self, vocab_size: int, count: int) -> list[str]:
        """Prompts of random characters, none of which ends an answer."""
        random = np.random.default_rng(self.seed)
        lengths = random.lognormal(np.log(self.median_prompt), self.spread, count)
        lengths = np.clip(lengths, 8, self.longest_prompt).astype(int)
        least = 1 + max(self.stop_ids(vocab_size), default=len(_SPECIAL))
        return ["".join(map(_character, random.integers(least, vocab_size, length))) for length in lengths]


@dataclass(frozen=True)
class Iteration:
    """One of them: tokens of prompts and of answers, each answer with its prompt; seconds, and those of phases."""

    prompt_tokens: int
    answer_tokens: int
    seconds: float
    phases: dict[str, float]

    @property
    def speed(self) -> float:
        return (self.prompt_tokens + self.answer_tokens) / self.seconds


def _character(token: int) -> str:
    return chr(_FIRST_CHARACTER + token)


def reward(text: str) -> float:
    """The share of an answer's characters with an even id: something that both can be trained on."""
    return sum(ord(character) % 2 == 0 for character in text) / max(1, len(text))


def write_base(directory: Path, shape: ModelConfig, load: Load, dtype: torch.dtype) -> None:
    """A model directory with fresh weights, and a tokenizer of one id a character."""
    ends = tuple(load.stop_ids(shape.vocab_size)) or _SPECIAL.index("</s>")
    config = ModelConfig(**{**vars(shape), "bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 0})
    shapes = parameter_shapes(config)
    write_model(
        directory, config, ((name, initial_value(config, name, shapes[name], load.seed)) for name in shapes), dtype
    )
    vocabulary = {token: number for number, token in enumerate(_SPECIAL)}
    vocabulary |= {_character(number): number for number in range(len(_SPECIAL), shape.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(list(_SPECIAL))
    named = dict(zip(("pad_token", "bos_token", "eos_token"), _SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(directory)


class Ours:
    """The steps of `rlhf.ppo`, on prompts of our own."""

    def __init__(
        self,
        directory: Path,
        texts: list[str],
        load: Load,
        micro_batch_tokens: int,
        precision: Precision,
        runtime: Runtime,
    ) -> None:
        model = load_config(directory).with_context(load.longest_prompt + load.longest_answer)
        recipe = PpoConfig(
            model=str(directory),
            out=str(directory / "run"),  # nothing is written
            seed=load.seed,
            train=PpoTrainConfig(steps=1000, context=model.context, micro_batch_tokens=micro_batch_tokens),
            optim=OptimConfig(lr=1e-6, beta2=0.999, weight_decay=0.0),
            schedule=ScheduleConfig(kind="constant", warmup_ratio=0.0),
            rollout=RolloutConfig(prompts=load.prompts, samples=load.samples, max_new_tokens=load.longest_answer),
            kl=KlConfig(coef=load.kl, place="loss", estimator="k3"),
            ppo=AlgorithmConfig(advantage="group", epochs=load.epochs, minibatches=load.minibatches),
        )
        recipe.check()
        tokenizer = Tokenizer.load(directory)
        base = Base(load_config(directory), directory)
        template = ChatTemplate.named("plain", tokenizer)
        self._runtime, self._load, self._iterations = runtime, load, 0
        self.samples: list[Sample] = []
        stops = load.stop_ids(model.vocab_size)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        assert model.context is not None
        self.learner = Learner(
            config=recipe,
            runtime=runtime,
            roles=make_roles(recipe, base, model, tokenizer, template, None, precision, runtime),
            rollout=Rollout(model, tokenizer, stops, seed=load.seed, dtype=dtype, context=model.context),
            scorer=Scorer(lambda prompts, samples, *_: torch.tensor([reward(one.text) for one in samples])),
            held_out=(),
            fresh_prompts=lambda cursor: _InOrder(texts, tokenizer),
        )
        self.learner.begin()

    def step(self) -> Iteration:
        learner, load, phases = self.learner, self._load, {}
        begin = last = now(self._runtime.device)

        def ends(phase: str) -> None:
            nonlocal last
            at = now(self._runtime.device)
            phases[phase], last = at - last, at

        prompts = learner.prompts.next(load.prompts)
        self.samples = learner.sample(prompts, load.samples)
        ends("generation")
        trajectory, _ = learner.score(prompts, self.samples)
        trajectory = learner.estimate(learner.read(trajectory, self._iterations))
        ends("reading")
        report = learner.update(trajectory, self._iterations)
        ends("update")
        assert np.isfinite(report["loss"])
        self._iterations += 1
        prompt_tokens, answer_tokens = (
            sum(map(len, (getattr(one, name) for one in self.samples))) for name in ("prompt_ids", "answer_ids")
        )
        return Iteration(prompt_tokens, answer_tokens, last - begin, phases)


class _InOrder(PromptStream):
    """Prompts in their order, again and again."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer) -> None:
        self._ids = [tokenizer.encode(text) for text in texts]
        self._position = 0

    def next(self, count: int) -> list[Prompt]:
        positions = range(self._position, self._position + count)
        self._position += count
        return [Prompt(at, self._ids[at % len(self._ids)], (), {}) for at in positions]


class Peer:
    """TRL's trainer. It keeps the loop, so others take their turn between two of its iterations."""

    def __init__(self, directory: Path, texts: list[str], load: Load, batch: int, runtime: Runtime) -> None:
        trl, datasets = import_trl()
        is_cuda = runtime.device.type == "cuda"
        accumulated = load.answers // load.minibatches // batch
        self._steps = load.epochs * load.minibatches
        self._device, self.batch_size = runtime.device, batch
        self._options = dict(
            output_dir=str(directory / "trl"),
            per_device_train_batch_size=batch,
            steps_per_generation=load.answers // batch,
            gradient_accumulation_steps=accumulated,
            num_generations=load.samples,
            num_iterations=load.epochs,
            max_completion_length=load.longest_answer,
            generation_kwargs={} if load.mean_answer else {"min_new_tokens": load.longest_answer},
            temperature=1.0,
            beta=load.kl,
            use_bias_correction_kl=False,
            loss_type="dapo",
            scale_rewards="group",
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            adam_beta2=0.999,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            bf16=is_cuda,
            use_cpu=not is_cuda,
            dataloader_pin_memory=is_cuda,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=load.seed,
        )
        self._trl = trl
        self._tokens: tuple[int, int] = (0, 0)
        self._phases: dict[str, float] = {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).to(runtime.device)
        self._arguments = dict(
            model=model,
            reward_funcs=self._reward,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            processing_class=transformers.AutoTokenizer.from_pretrained(directory),
        )
        self.model = model

    def race(self, iterations: int, between: Callable[[], None] = lambda: None) -> list[Iteration]:
        """Train so many iterations; `between` is called before each, off the clock."""
        done: list[Iteration] = []
        begin = 0.0

        class Turns(transformers.TrainerCallback):
            def on_step_begin(turns, args: Any, state: Any, *_: Any, **__: Any) -> None:
                nonlocal begin
                if state.global_step % self._steps == 0:
                    # What it does between two iterations is the earlier one's.
                    if state.global_step:
                        done.append(self._lap(begin))
                    with _determinism(True):
                        between()
                    self._tokens = 0, 0
                    self._phases.clear()
                    begin = now(self._device)

        options = self._trl.GRPOConfig(**self._options, max_steps=iterations * self._steps)
        trainer = self._trl.GRPOTrainer(args=options, callbacks=[Turns()], **self._arguments)
        self._time(trainer, "_generate", "generation")
        self._time(trainer, "_generate_and_score_completions", "rollout")
        # Our determinism is not asked of the peer: on a GPU it would slow it down.
        with _determinism(False), contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        return [*done, self._lap(begin)]

    def _lap(self, begin: float) -> Iteration:
        seconds = now(self._device) - begin
        generation, rollout = (self._phases[name] for name in ("generation", "rollout"))
        phases = {"generation": generation, "reading": rollout - generation, "update": seconds - rollout}
        return Iteration(*self._tokens, seconds, phases)

    def _time(self, trainer: Any, method: str, phase: str) -> None:
        inner = getattr(trainer, method)

        def timed(*arguments: Any) -> Any:
            begin = now(self._device)
            result = inner(*arguments)
            self._phases[phase] = self._phases.get(phase, 0.0) + now(self._device) - begin
            return result

        setattr(trainer, method, timed)

    def _reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        self._tokens = sum(map(len, prompts)), sum(map(len, completion_ids))
        return [reward(completion) for completion in completions]


@contextlib.contextmanager
def _determinism(is_on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_on, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


def import_trl() -> tuple[Any, Any]:
    """
    Raises:
        InputError: it is not installed.
    """
    try:
        import datasets
        import trl
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed, and nothing but this race needs it. Install it with pip install trl, best "
            "in an environment of its own, or leave the race out with --peer none."
        ) from None
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    return trl, datasets


@torch.no_grad()
def largest_difference(peer: Peer, samples: list[Sample]) -> float:
    """Of log-probabilities, ours as they were sampled and the peer's, before either model has moved."""
    worst = 0.0
    for sample in samples:
        ids = torch.tensor([*sample.prompt_ids, *sample.answer_ids], device=peer.model.device)
        logits = peer.model(ids[None, :-1]).logits[0].float()
        theirs = logits.log_softmax(dim=-1).gather(1, ids[1:, None]).squeeze(1)[len(sample.prompt_ids) - 1 :]
        worst = max(worst, (theirs - torch.tensor(sample.logprobs, device=theirs.device)).abs().max().item())
    return worst
