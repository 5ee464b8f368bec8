"""The facts and the documents, made once for all tests of the sample."""

from dataclasses import dataclass

import pytest

from samples.knowledge import Knowledge, load_knowledge
from samples.render import Document, render_pretraining


@dataclass(frozen=True)
class Splits:
    train: list[Document]
    held_out: list[Document]

    @property
    def all(self) -> list[Document]:
        return self.train + self.held_out


@pytest.fixture(scope="session")
def knowledge() -> Knowledge:
    return load_knowledge()


@pytest.fixture(scope="session")
def splits(knowledge: Knowledge) -> Splits:
    return Splits(*render_pretraining(knowledge))
