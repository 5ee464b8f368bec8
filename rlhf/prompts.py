"""Prompts to be answered, in an order that a cursor names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.permutation import Permutation
from engine.loop import EvalConfig
from engine.stored_prompts import Prompt, Prompts, open_prompts
from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer
from rlhf.ppo_config import PromptDataConfig

__all__ = ["Prompt", "PromptStream", "Prompts", "open_prompts", "open_split_prompts"]


def open_split_prompts(
    data: PromptDataConfig,
    evaluation: EvalConfig,
    max_new_tokens: int,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    context: int,
    directory: Path,
) -> tuple[Prompts, Prompts]:
    """Prompts to train on and held-out ones, of which none begin with the same question; see `open_prompts`.

    Raises:
        InputError: no prompt, or all of them are held out.
    """

    def read(paths: list[str]) -> Prompts:
        return open_prompts(paths, data.keys, template, tokenizer, context, max_new_tokens, directory, data.system)

    prompts = read(data.paths)
    if evaluation.data:
        held_out = read(evaluation.data)
        prompts = prompts.without(held_out)
    else:
        prompts, held_out = prompts.split(evaluation.fraction)
    if not len(prompts):
        raise InputError(
            f"All prompts are held out by {', '.join(evaluation.data) or 'their hash'}. Give --eval.data other files."
        )
    return prompts, held_out


class PromptStream:
    """Prompts without end: every one once an epoch, in an order that is a function of seed, prompts and epoch.

    What an epoch leaves over comes together with the beginning of the next: nothing is dropped, and nothing repeated.

    Args:
        cursor: of an earlier stream, where this one goes on.
    Raises:
        InputError: the cursor is of other prompts.
    """

    def __init__(self, prompts: Prompts, seed: int, cursor: Mapping[str, Any] | None = None) -> None:
        self._prompts, self._seed = prompts, seed
        self._position = 0
        if cursor is not None:
            if cursor["prompts"] != prompts.fingerprint:
                raise InputError(
                    "The checkpoint stands in the middle of other prompts than --data gives now. Restore the files, "
                    "or begin again with --resume never."
                )
            self._position = cursor["position"]

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the stream stands, fit for JSON."""
        return {"position": self._position, "prompts": self._prompts.fingerprint}

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far."""
        return self._position / len(self._prompts)

    def next(self, count: int) -> list[Prompt]:
        """The next prompts, the same on every rank."""
        positions = np.arange(self._position, self._position + count)
        self._position += count
        epochs, places = np.divmod(positions, len(self._prompts))
        for epoch in np.unique(epochs):
            order = Permutation(len(self._prompts), self._seed, self._prompts.fingerprint, int(epoch))
            places[epochs == epoch] = order(places[epochs == epoch])
        return [self._prompts.prompt(int(at), int(p)) for at, p in zip(places, positions, strict=True)]
