"""The choice of tokens within a CUDA graph is the choice without one."""

from __future__ import annotations

import pytest
import torch

from model.sampling import TokenChooser
from tests.kernels.oracle import random
from tests.model.test_sampling import MIXED

pytestmark = pytest.mark.gpu


def test_a_captured_graph_draws_what_steps_one_by_one_draw() -> None:
    logits = random(len(MIXED), 151936, dtype=torch.bfloat16)
    eager, captured = (TokenChooser(len(MIXED), 151936, "cuda") for _ in range(2))
    for row, option in enumerate(MIXED):
        eager.seat(row, option, row, [row])
        captured.seat(row, option, row, [row])
    captured.choose(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, logprob = captured.choose(logits)
    for row, option in enumerate(MIXED):  # the same sequences from the beginning
        captured.seat(row, option, row, [row])
    for _ in range(4):
        expected = eager.choose(logits)
        graph.replay()
        assert torch.equal(token, expected[0]) and torch.equal(logprob, expected[1])
