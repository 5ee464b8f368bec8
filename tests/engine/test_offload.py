"""Tensors that wait in host memory: their memory is given back, they stay the same tensors, and no bit changes."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch

from engine import offload
from engine.mesh import ParallelConfig, start
from engine.offload import Parking
from engine.optim import AdamW, OptimConfig
from engine.shard import fill, local, parallelize
from model.config import parameter_shapes
from model.heads import CausalLM
from model.init import initial_value
from tests.model.tiny import LLAMA, batch
from tests.ranks import run_ranks


@pytest.fixture(params=[1 << 28, 100, 7])
def pieces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Host memory in one piece, and in many that cut through tensors."""
    with patch.object(offload, "_PIECE", request.param):
        yield


def test_storage_is_given_back_and_comes_back_to_the_bit_in_the_same_tensors(pieces: None) -> None:
    tensors = [torch.randn(5, 7), torch.arange(11), torch.randn(3).bfloat16(), torch.zeros(0)]
    view = tensors[0][2]
    before = [tensor.clone() for tensor in tensors]
    parking = Parking(lambda: tensors)
    for _ in range(2):
        with parking.away():
            assert parking.is_away
            assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * 4
        assert not parking.is_away
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
        assert torch.equal(view, before[0][2])
        tensors[0] += 1
        before[0] += 1


def test_they_come_back_when_what_was_done_meanwhile_fails() -> None:
    tensor = torch.arange(6)
    with pytest.raises(RuntimeError, match="meanwhile"), Parking(lambda: [tensor]).away():
        raise RuntimeError("meanwhile")
    assert tensor.tolist() == list(range(6))


def test_tensors_that_share_memory_travel_once() -> None:
    whole = torch.randn(100)
    parking = Parking(lambda: [whole[:50], whole[50:], whole])
    before = whole.clone()
    with parking.away():
        assert sum(map(len, parking._pieces)) == 400
    assert torch.equal(whole, before)


def train(waits: bool) -> tuple[list[np.ndarray], int]:
    """Weights after three updates of a sharded model, and bytes of moments that were there while they were away."""
    runtime = start(ParallelConfig())
    with torch.device("meta"):
        model = CausalLM(LLAMA)
    parallelize(model, runtime, ParallelConfig(), "bf16", "none")
    fill(model, ((name, initial_value(LLAMA, name, shape, 0)) for name, shape in parameter_shapes(LLAMA).items()))
    optimizer = AdamW(model, OptimConfig(lr=1e-2))
    moments = [*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values()]
    parking, there = Parking(lambda: moments), 0
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for step in range(3):
        (-model(batch([9, 17], seed=step)).logprob.sum()).backward()
        if waits:
            with parking.away():
                there += sum(local(moment).untyped_storage().nbytes() for moment in moments)
        optimizer.step(one * 1e-2, one, zero)
        optimizer.zero_grad()
    return [local(p).detach().numpy() for p in model.parameters()], there


def train_twice() -> bool:
    """Whether waiting freed all memory, and changed no bit."""
    (stayed, _), (waited, there) = train(waits=False), train(waits=True)
    return there == 0 and all(np.array_equal(x, y) for x, y in zip(stayed, waited, strict=True))


def test_moments_of_shards_come_back_to_the_bit() -> None:
    assert run_ranks(train_twice, 2) == [True, True]
