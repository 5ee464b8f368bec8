"""The reward-model job: comparisons in; out comes a model that gives a number for an answer, and how good it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.building import find_trained, publisher
from engine.config import check_range
from engine.job import STORED, TrainConfig, begin_anew, make_model, resolve_precision
from engine.launch import speak
from engine.mesh import start, stop
from engine.optim import OptimConfig
from engine.schedule import ScheduleConfig
from model.errors import InputError
from model.heads import ScalarModel
from model.tokenizer import Tokenizer
from rlhf.comparison_job import ComparisonConfig, open_comparisons, plan_on_comparisons, train_on_comparisons
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
class RmConfig(ComparisonConfig):
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

    takes_fp8 = True

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
        return plan_on_comparisons(config, base, LEARNING_RATE, head="score", loss="cross_entropy")
    runtime = start(config.parallel)
    comparisons = open_comparisons(config, base, LEARNING_RATE, runtime, config.normalise.data)
    tokenizer, template, shape = comparisons.tokenizer, comparisons.template, comparisons.shape
    with runtime.main_first():
        answers = config.normalise.open(template, tokenizer, shape.context, directory)
    ends = template.end_ids(tokenizer)
    model_config = dataclasses.replace(
        comparisons.model, head="score", score_mean=None, score_std=None, pad_token_id=padding_id(tokenizer, ends)
    )
    comparisons = dataclasses.replace(comparisons, model=model_config)
    if runtime.is_main:
        comparisons.describe()

    precision = resolve_precision(config.train, runtime)
    model = make_model(ScalarModel, model_config, config, base, precision, runtime)
    judge = HeldOut(model, comparisons.held_out, answers, ends, shape, runtime, config.eval.max_tokens)
    if config.resume == "never":
        begin_anew(directory, runtime)
    train_on_comparisons(
        comparisons,
        model,
        ranking_objective(**vars(config.loss)),
        identity={"stage": "rm", "loss": config.loss.kind},
        publish=publisher(
            model,
            lambda: judge.normalised(model_config),
            template.store(tokenizer),
            "rm",
            STORED[precision],
            config.lora.spec(),
            base.directory,
        ),
        shown=SHOWN,
    )
    if runtime.is_main:
        figures = measure(judge.judged)
        write_report(directory, figures)
        print(summary(figures))
    speak(f"Done: {directory} is a reward model; its report.md says how good it is.")
    stop()


def padding_id(tokenizer: Tokenizer, ends: Sequence[int]) -> int:
    """What fills up batches in transformers, whose classifiers read the score at the last token that is another.

    So it is none that ends an answer: where the tokenizer pads with its end token, it is one that no text ends with.
    """
    named = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, *range(tokenizer.vocab_size))
    return next(token for token in named if token is not None and token not in ends)
