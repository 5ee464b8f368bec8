"""A trained reward model: what its directory says, who may use it, and the scores it gives.

A score is read at the last token of an answer, its end token. The raw score means nothing by itself; the directory
keeps mean and deviation over answers of people, by which every consumer here normalises it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.data.ranked_batch import RankedBatch
from engine.mesh import Runtime
from engine.publish import require_model
from engine.shard import free_gathered
from engine.step import Loss, Objective
from model.chat import ChatTemplate
from model.config import ModelConfig
from model.errors import InputError
from model.hf import load_config, read_model
from model.tokenizer import Tokenizer, has_tokenizer
from rlhf.ranking_loss import RankingLoss, pair_means, ranking_accuracy, ranking_loss


@dataclass(frozen=True)
class RewardModel:
    """The facts of a directory; its weights are read by `model.hf.read_model(directory, config)`.

    mean, std: of raw scores over the answers it was normalised by; 0 and 1 where it was not.
    """

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    mean: float
    std: float

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw scores to those in which good answers of people have mean 0 and deviation 1."""
        return (raw - self.mean) / self.std


def open_reward_model(
    directory: Path | str,
    tokenizer: Tokenizer | None = None,
    template: ChatTemplate | None = None,
    rows: int | None = None,
) -> RewardModel:
    """The reward model of a directory, if it can judge what is written with this tokenizer and template.

    Args:
        tokenizer, template: of the model to be judged; None for the reward model's own.
        rows: of that model's vocabulary, padding included: any of them may be sampled.
    Raises:
        InputError: no whole model; a language model, whose reward head would be random; a tokenizer or template that
            differs from the one given, so that it would read other ids than it was trained on; fewer rows.
    """
    directory = require_model(directory)
    config = load_config(directory, "score")
    read_model(directory, config)  # opens every file, and compares names and shapes
    if not has_tokenizer(directory):
        raise InputError(f"{directory} holds no tokenizer. Copy its files from the model that it was trained from.")
    own = Tokenizer.load(directory)
    if tokenizer is not None and tokenizer.fingerprint != own.fingerprint:
        raise InputError(
            f"{directory} reads with another tokenizer than {tokenizer.source}; its ids would mean other words. Train "
            "a reward model from the model to be judged, with tools/rm.py --model."
        )
    if rows is not None:
        require_rows(config, rows, str(directory))
    stored = ChatTemplate.of(own)
    if stored is None:
        raise InputError(
            f"{directory} stores no chat template, so nobody knows what its scores are of. Put the chat_template.jinja "
            "there that it was trained with."
        )
    if template is not None and template.source != stored.source:
        raise InputError(
            f"{directory} was trained with the chat template {stored.name}, but {template.name} is in use. Train a "
            "reward model from the model to be judged, with tools/rm.py --model."
        )
    mean, std = config.score_mean, config.score_std
    return RewardModel(directory, config, own, stored, 0.0 if mean is None else mean, 1.0 if std is None else std)


def require_rows(config: ModelConfig, rows: int, name: str) -> None:
    """See that a model has a row for every id that a policy of so many rows may sample.

    Raises:
        InputError: it has fewer; reading the others would fail on the device.
    """
    if config.vocab_size < rows:
        raise InputError(
            f"{name} has {config.vocab_size:,} rows for ids, the policy {rows:,}, and may sample any of them. Give a "
            "model that was trained from the same base."
        )


SHOWN = ("accuracy", "margin")
"""Of pairs, how many are in the right order; and by how much the better answer's raw score exceeds the worse one's."""


def ranking_objective(kind: RankingLoss, margin: float, centre: float) -> Objective[RankedBatch]:
    """The loss of comparisons by a reward model, and what is `SHOWN`. The loss that is shown is without margin and
    centring, so that it means the same in every run."""

    def objective(model: nn.Module, batch: RankedBatch) -> Loss:
        scores = model(batch.batch)[batch.ends]
        total, count = ranking_loss(scores, batch, kind, margin, centre)
        shown = total if margin == centre == 0 else ranking_loss(scores, batch, kind)[0]
        better, worse = pair_means(scores, batch)
        means = torch.stack([ranking_accuracy(scores, batch), better - worse])
        return Loss(total, shown.detach(), count, means.detach())

    return objective


@torch.no_grad()
def score_sequences(model: nn.Module, batches: Iterable[RankedBatch], count: int, runtime: Runtime) -> Tensor:
    """Raw scores of all sequences of a set, the same on every rank.

    Args:
        batches: this rank's share of the set, in which each sequence is once; the same number on every rank.
        count: sequences in the set.
    Returns:
        float64 [count] on the CPU.
    """
    scores = torch.zeros(count, dtype=torch.float64, device=runtime.device)
    for batch in batches:
        here = batch.to(runtime.device)
        values = model(here.batch)[here.ends].double()
        scores.index_add_(0, here.sequence.clamp(min=0), values.where(here.is_sequence, 0.0))
    free_gathered(model)
    return runtime.sum(scores).cpu()
