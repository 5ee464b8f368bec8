"""The random numbers behind sampling and stochastic rounding, word for word."""

from __future__ import annotations

import pytest
import torch

from kernels.philox import philox


@pytest.mark.parametrize(
    ("counter", "key", "published"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_words_its_authors_publish(counter: str, key: str, published: str) -> None:
    counter_words, key_words = ([torch.tensor(int(word, 16)) for word in text.split()] for text in (counter, key))
    assert [f"{word:08x}" for word in philox(tuple(counter_words), tuple(key_words))] == published.split()
