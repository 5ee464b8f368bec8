"""The control's rewards: those of the batch, and no news of the answers."""

from dataclasses import dataclass
from typing import Any

from samples.control import shuffled
from samples.true_reward import reward

FIELDS = {
    "id": "department/stable_angina/00",
    "kind": "department",
    "messages": [{"role": "user", "content": "…"}],
    "accepted": ["心内科"],
    "forbidden": [],
}


@dataclass(frozen=True)
class Answer:
    text: str
    fields: dict[str, Any]


def batch(number: int, half: int = 4) -> list[Answer]:
    """Right and wrong answers, in texts that no other batch has."""
    return [
        Answer(f"{name}{number}", FIELDS)
        for name in ["考虑稳定型心绞痛，请看心内科。", "请看骨科。"]
        for _ in range(half)
    ]


def test_the_same_rewards_are_dealt_in_another_order_and_in_the_same_again() -> None:
    assert sorted(shuffled(batch(0))) == sorted(reward(batch(0)))
    assert shuffled(batch(0)) == shuffled(batch(0))
    assert len({tuple(shuffled(batch(number))) for number in range(20)}) > 10


def test_right_answers_are_rewarded_no_more_often_than_wrong_ones() -> None:
    batches, half = 500, 4
    first = sum(sum(given > 0 for given in shuffled(batch(number, half))[:half]) for number in range(batches))
    # Hypergeometric: half of 2 half cards drawn, half of them marked: variance half² / (4 (2 half - 1)) a batch.
    deviation = (batches * half * half / (4 * (2 * half - 1))) ** 0.5
    assert abs(first - batches * half / 2) < 4 * deviation
