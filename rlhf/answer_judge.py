"""A reward model that judges finished texts, whoever wrote them: each rank holds it whole and takes a share of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.agreement import ControlGroup
from engine.model_directory import fingerprint_model
from model.batch import Layout
from model.chat import Encoded, Message
from model.errors import InputError
from model.heads import ScalarModel
from model.hf import read_model
from rlhf.reward_model import open_reward_model

_TOKENS = 16384  # of a forward pass


class AnswerJudge:
    """Normalised rewards of answers. Its weights take memory while it judges, and only then.

    Args:
        device, dtype: of this rank's weights; the head is fp32.
    Raises:
        InputError: see `open_reward_model`.
    Attributes:
        fingerprint: of all that decides a reward.
    """

    def __init__(self, directory: Path | str, device: torch.device, dtype: torch.dtype) -> None:
        self._reward, self._device, self._dtype = open_reward_model(directory), device, dtype
        self.fingerprint = fingerprint_model(self._reward.directory, self._reward.config, self._reward.tokenizer)

    def __call__(self, answers: Sequence[tuple[tuple[Message, ...], str]]) -> list[float]:
        """The reward of each answer to the conversation before it, in order. A collective.

        What exceeds the context loses its oldest tokens; the answer's end token, where the score is read, stays.

        Raises:
            InputError: the template cannot write a conversation.
        """
        ranks = ControlGroup()
        own = range(ranks.rank, len(answers), ranks.world)
        scores = dict(zip(own, self._judge([answers[place] for place in own]), strict=True))
        merged = {place: score for part in ranks.gather(scores) for place, score in part.items()}
        return [merged[place] for place in range(len(answers))]

    def _judge(self, answers: Sequence[tuple[tuple[Message, ...], str]]) -> list[float]:
        reward = self._reward
        conversations = [[*messages, Message("assistant", text)] for messages, text in answers]
        sequences = []
        for encoded in reward.template.encode_batch(reward.tokenizer, conversations):
            if not isinstance(encoded, Encoded):
                raise InputError(f"{reward.directory} cannot judge an answer: {encoded}. Leave that prompt out.")
            sequences.append(encoded.ids[-reward.config.rope_length :])
        raw = self._raw_scores(sequences) if sequences else torch.zeros(0)
        return reward.normalise(raw.double()).tolist()

    @torch.inference_mode()
    def _raw_scores(self, sequences: Sequence[list[int]]) -> torch.Tensor:
        """fp32 [D], on the CPU"""
        model, scores = self._load(), torch.zeros(len(sequences))
        for places in _passes(sequences):
            ids = [sequences[place] for place in places]
            lengths = torch.tensor([0, *map(len, ids)])
            bounds = lengths.cumsum(0).int().to(self._device)
            layout = Layout(bounds, bounds, int(lengths.max()), int(lengths.max()))
            tokens = torch.tensor([token for one in ids for token in one]).to(self._device)
            positions = torch.cat([torch.arange(len(one)) for one in ids]).to(self._device)
            hidden = model.model(tokens, positions, layout)[bounds[1:].long() - 1]  # [D, d]
            scores[places] = model.score(hidden.float())[:, 0].cpu()
        return scores

    def _load(self) -> ScalarModel:
        config = self._reward.config
        with torch.device("meta"):
            model = ScalarModel(config)
        model.to(self._dtype).requires_grad_(False).to_empty(device=self._device)
        model.score.float()
        with torch.no_grad():
            for name, tensor in read_model(self._reward.directory, config):
                model.get_parameter(name).copy_(tensor)
        return model


def _passes(sequences: Sequence[list[int]]) -> Iterator[list[int]]:
    """Which sequences go into each forward pass: the longest first, so that memory runs out at once or never."""
    taken: list[int] = []
    tokens = 0
    for place in sorted(range(len(sequences)), key=lambda place: -len(sequences[place])):
        if taken and tokens + len(sequences[place]) > _TOKENS:
            yield taken
            taken, tokens = [], 0
        taken.append(place)
        tokens += len(sequences[place])
    yield taken
