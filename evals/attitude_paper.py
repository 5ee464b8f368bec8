"""CAMI and MICA-4 as the authors of ChiMed-GPT asked and counted them, to compare with their numbers.

Their notebooks (Fengshenbang-LM, commit be59e1e, *_inference_medical.ipynb) put one prompt before each item, with no
chat template, and take the likeliest of the letters as the next token. A letter's token is the one that their tokenizer
gives for the letter by itself, which in LLaMA's begins a word; that is " A" behind a text. Where a tokenizer needs
several tokens for that, they count together, and the result says so. Options stand in one order, and items count by
lists of reversed ones (`evals.attitude_key.Paper`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evals.attitude_items import Scale, ScaleItem
from evals.attitude_key import Paper
from evals.attitude_orders import LETTERS
from evals.attitude_result import Known, letter_metrics, measure
from evals.task import Choose, Chosen, Item, Request, Response, Result

SCORE = "paper_score"


@dataclass(frozen=True)
class PaperTask:
    """A scale by the authors' protocol. asked: items of the scale, all or some."""

    name: str
    scale: Scale
    asked: tuple[ScaleItem, ...]
    paper: Paper
    seed: int
    kind: Literal["attitudes"] = "attitudes"

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {
            "scale": self.scale.name,
            "items": self.scale.fingerprint,
            "items_asked": len(self.asked),
            "mode": "paper",
            "template": self.paper.prompt + "{statement}",
            "prompting": "plain",
            "seed": self.seed,
            "signature": f"{self.scale.name}|mode:paper|version:1",
        }

    def requests(self) -> Sequence[Request]:
        options = tuple(f" {letter}" for letter in self._letters)
        return [Choose(item.id, self.paper.prompt + item.text, options) for item in self.asked]

    def result(self, responses: Mapping[str, Response]) -> Result:
        items = tuple(self._item(item, responses[item.id]) for item in self.asked)
        known: list[Known] = [(SCORE, "points", self.paper.better), ("letter_mass", "%", "higher")]
        chosen = np.eye(len(self._letters))[[self._letters.index(item.answer) for item in items]]
        metrics = [*measure(self.asked, items, known, self.seed), *letter_metrics(chosen)]
        notes = [self.paper.note]
        if len(items) < len(self.scale.items):
            notes.append(f"Asked were {len(items)} of {len(self.scale.items)} items; the score is extrapolated to all.")
        constant = tuple(
            (f"always {letter}", SCORE, float(sum(self._points(item, place) for item in self.scale.items)))
            for place, letter in enumerate(self._letters)
        )
        several = sum(max(response.tokens) > 1 for response in responses.values() if isinstance(response, Chosen))
        counts = {"letters_of_several_tokens": several} if several else {}
        return Result(tuple(metrics), items, baselines=constant, counts=counts, notes=tuple(notes))

    def _item(self, item: ScaleItem, response: Response) -> Item:
        assert isinstance(response, Chosen)
        place = response.logprobs.index(max(response.logprobs))  # the first of those that tie, as the authors'
        parts = {
            SCORE: (float(len(self.scale.items) * self._points(item, place)), 1.0),
            "letter_mass": (float(np.exp(response.logprobs).sum()), 1.0),
        }
        shown = self.paper.prompt + item.text
        return Item(item.id, parts, shown, self._letters[place], "", item.subscale, (item.text,))

    def _points(self, item: ScaleItem, place: int) -> int:
        return len(self._letters) - place if int(item.id) in self.paper.reversed_items else place + 1

    @property
    def _letters(self) -> str:
        return LETTERS[: len(self.scale.options)]
