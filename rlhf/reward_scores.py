"""What a reward model is judged by, while and after it is trained: held-out answers, their scores and moments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.conversations import ConversationDataConfig, open_conversations
from engine.data.corpus import Corpus
from engine.data.groups import PreferenceSet
from engine.data.loader import evaluation_batches
from engine.data.ranked_loader import evaluation_ranked_batches
from engine.job import StepShape
from engine.launch import speak
from engine.mesh import Runtime
from engine.shard import free_gathered
from model.chat import ChatTemplate
from model.config import ModelConfig
from model.errors import InputError
from model.tokenizer import Tokenizer
from rlhf.reward_model import score_sequences
from rlhf.reward_report import Judged

# Scores that differ by less than fp32 rounds are one score.
_LEAST_STD = 1e-6


@dataclass
class NormaliseConfig:
    """Good answers of people, whose scores shall have mean 0 and deviation 1."""

    data: list[str] = field(default_factory=list)
    """files of conversations, best such as fine-tuning has held out; by default the best held-out answers"""

    def open(self, template: ChatTemplate, tokenizer: Tokenizer, context: int, directory: Path) -> Corpus | None:
        """The conversations, prepared below `directory`/prepared; None where none are given. Raises InputError."""
        if not self.data:
            return None
        return open_conversations(ConversationDataConfig(paths=self.data), template, tokenizer, context, directory)


class HeldOut:
    """Answers that are not trained on, and the scores that a model gives them.

    Args:
        comparisons: held-out ones, or None.
        answers: conversations to normalise by; None for the best answers of the comparisons.
        end_ids: what ends an answer; one that was cut to the context is not scored.
        max_tokens: of the conversations that are read.
    Raises:
        InputError: fewer than two answers to normalise by.
    Attributes:
        judged: the comparisons with the scores that `normalised` found last.
    """

    def __init__(
        self,
        model: nn.Module,
        comparisons: PreferenceSet | None,
        answers: Corpus | None,
        end_ids: Sequence[int],
        shape: StepShape,
        runtime: Runtime,
        max_tokens: int,
    ) -> None:
        self._model, self._comparisons, self._answers, self._runtime = model, comparisons, answers, runtime
        self._end_ids = torch.tensor(end_ids, device=runtime.device)
        self._reading = (shape.tokens_per_pack, shape.context, runtime.rank, runtime.world)
        self._max_tokens = max_tokens
        self.judged = Judged.empty()
        judges = answers if answers is not None else comparisons
        count = 0 if judges is None else judges.num_documents
        if count < 2:
            raise InputError(
                f"{count} held-out prompts give no mean and deviation to normalise scores by. Raise --eval.fraction, "
                "or give --normalise.data conversations."
            )

    def normalised(self, config: ModelConfig) -> ModelConfig:
        """The configuration with mean and deviation of the model as it is now. A collective.

        Raises:
            InputError: the answers have one score.
        """
        if self._comparisons is not None:
            self.judged = self._judge(self._comparisons)
        if self._answers is not None:
            count, mean, std = self._moments(self._answers)
        else:
            best = self.judged.scores[self.judged.best]
            count, mean, std = len(best), float(best.mean()), float(best.std())
        if count < 2 or not std > _LEAST_STD:
            raise InputError(
                f"The {count} answers to normalise by have scores of mean {mean:.4g} and deviation {std:.2g}: that "
                "normalises nothing. Give more of them with --normalise.data, or train with another --optim.lr."
            )
        speak(f"Scores of {count:,} held-out answers: mean {mean:.4f}, deviation {std:.4f}; they become 0 and 1.")
        self.judged = dataclasses.replace(self.judged, std=std)
        return dataclasses.replace(config, score_mean=mean, score_std=std)

    def _judge(self, comparisons: PreferenceSet) -> Judged:
        """Every answer of the comparisons with its score."""
        batches = evaluation_ranked_batches(comparisons, *self._reading)
        scores = score_sequences(self._model, batches, comparisons.num_sequences, self._runtime).numpy()
        rows = [
            (group.first_sequence + place, number, grade, len(ids) - start)
            for number, group in enumerate(map(comparisons.group, comparisons.documents().tolist()))
            for place, (ids, start, grade) in enumerate(zip(group.ids, group.answer_starts, group.grades, strict=True))
        ]
        sequences, groups, grades, lengths = (np.array(column) for column in zip(*rows, strict=True))
        return Judged(scores[sequences], grades, groups, lengths)

    @torch.no_grad()
    def _moments(self, answers: Corpus) -> tuple[int, float, float]:
        """Number, mean and deviation of the scores of conversations, each read at the end of its last answer."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._runtime.device)
        for batch in evaluation_batches(answers, *self._reading, self._max_tokens):
            here = batch.to(self._runtime.device)
            ends = here.cu_seqlens[1 : here.num_documents + 1].long() - 1
            scores = self._model(here)[ends].double()
            scores = scores[torch.isin(here.tokens[ends], self._end_ids)]
            sums += torch.stack([torch.ones_like(scores), scores, scores.square()]).sum(1)
        free_gathered(self._model)
        count, total, squares = self._runtime.sum(sums).tolist()
        mean = total / max(count, 1)
        return int(count), mean, math.sqrt(max(squares / max(count, 1) - mean**2, 0.0))
