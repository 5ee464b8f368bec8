"""Prompts to be answered, in an order that a cursor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.data.permutation import Permutation
from engine.stored_prompts import Prompt, Prompts, open_prompts
from model.errors import InputError

__all__ = ["Prompt", "PromptStream", "Prompts", "open_prompts"]


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
