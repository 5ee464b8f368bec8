"""The control: rewards that look like the true ones and know nothing of the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from samples.draw import Draw
from samples.true_reward import Answered, reward


def shuffled(answers: Sequence[Answered]) -> list[float]:
    """The true rewards of a batch, dealt to its answers at random: `--reward samples.control:shuffled`.

    What is trained on them has the same rewards to gain from, as often, and must gain nothing. The order is a function
    of the batch's texts, so that a resumed run deals as the unbroken one did.
    """
    texts = "\0".join(answer.text for answer in answers)
    return Draw(hashlib.blake2b(texts.encode()).hexdigest()).shuffled(reward(answers))
