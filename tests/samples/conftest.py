"""The facts, the documents and the conversations, made once for all tests of the sample."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import pytest

from samples.dialogues import Dialogue, render_dialogues
from samples.knowledge import Knowledge, load_knowledge
from samples.render import Document, render_pretraining

Item = TypeVar("Item")


@dataclass(frozen=True)
class Splits(Generic[Item]):
    train: list[Item]
    held_out: list[Item]

    @property
    def all(self) -> list[Item]:
        return self.train + self.held_out


@pytest.fixture(scope="session")
def knowledge() -> Knowledge:
    return load_knowledge()


@pytest.fixture(scope="session")
def splits(knowledge: Knowledge) -> Splits[Document]:
    return Splits(*render_pretraining(knowledge))


@pytest.fixture(scope="session")
def dialogues(knowledge: Knowledge) -> Splits[Dialogue]:
    """With full answers: what is judged and what is asked in evaluations."""
    return Splits(*render_dialogues(knowledge))


@pytest.fixture(scope="session")
def hurried(knowledge: Knowledge) -> Splits[Dialogue]:
    """With curt answers among them: what models are fine-tuned on."""
    return Splits(*render_dialogues(knowledge, is_hurried=True))
