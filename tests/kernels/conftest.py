"""What every test of a kernel runs under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import backend


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """A result that a kernel forgot to write is NaN, not what lay there before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def face(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The face that ops take in this test: `torch` or `triton`, see `tests.kernels.faces`."""
    monkeypatch.setattr(backend, "FACE", request.param)
    return request.param
