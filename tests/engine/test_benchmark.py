"""What races share: turns, medians, sizes, the work that counts, and a page that keeps what was there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.benchmark import Lap, append_record, fastest, median_speed, race, speeds_by_size, useful_flops
from tests.model.tiny import LLAMA
from tools.plain_decoder import PlainDecoder


def test_racers_take_turns_and_nobody_is_always_first() -> None:
    order: list[str] = []

    class Racer:
        def __init__(self, name: str, speed: int) -> None:
            self.name, self.speed = name, speed

        def step(self) -> Lap:
            order.append(self.name)
            return Lap(self.speed, 1.0)

    laps = race({"a": Racer("a", 10), "b": Racer("b", 20)}, 3)
    assert "".join(order) == "abbaab"
    assert (median_speed(laps["a"]), median_speed(laps["b"])) == (10, 20)


def test_sizes_are_tried_until_two_in_a_row_are_slower_or_memory_ends() -> None:
    speeds = {1: 5.0, 2: 9.0, 4: 8.0, 8: 7.0, 16: 100.0}
    assert speeds_by_size(list(speeds), speeds.__getitem__) == {1: 5.0, 2: 9.0, 4: 8.0, 8: 7.0}
    assert fastest(speeds) == 16

    def speed(size: int) -> float:
        if size > 2:
            raise torch.cuda.OutOfMemoryError
        return float(size)

    assert speeds_by_size([1, 2, 4], speed) == {1: 1.0, 2: 2.0}


def test_useful_operations_are_those_of_the_products_and_of_what_each_token_sees() -> None:
    length = 24
    tokens = torch.randint(1, LLAMA.vocab_size, (1, length))
    with FlopCounterMode(display=False) as counter:
        PlainDecoder(LLAMA)(tokens, tokens, torch.tensor([length - 1])).backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in counted.items() if "scaled_dot_product" not in op)
    pairs = torch.ones(length, length).tril().count_nonzero().item()
    # Forward a product of queries and keys and one with values, 2 h each; backward twice that.
    attention = LLAMA.num_layers * LLAMA.num_heads * pairs * 3 * 2 * 2 * LLAMA.head_dim
    assert useful_flops(LLAMA, [length]) == products + attention


def test_what_documents_cost_is_what_each_costs_alone() -> None:
    assert useful_flops(LLAMA, [8, 24]) == useful_flops(LLAMA, [8]) + useful_flops(LLAMA, [24])
    assert useful_flops(LLAMA, [32]) > useful_flops(LLAMA, [8, 24])
    assert useful_flops(LLAMA, [64]) / 64 == pytest.approx(LLAMA.flops_per_token(64, causal=True), rel=0.01)


def test_a_table_keeps_what_was_there(tmp_path: Path) -> None:
    for value in (1, 2):
        append_record(tmp_path / "deep" / "table", {"speed": value}, "# Heading", {"Speed": "speed", "None": "none"})
    assert (
        tmp_path / "deep" / "table.md"
    ).read_text() == "# Heading\n\n| Speed | None |\n|---|---|\n| 1 |  |\n| 2 |  |\n"
