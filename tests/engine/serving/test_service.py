"""The thread that owns the generator, without a server above it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.model_directory import ModelDirectory
from engine.serving.service import GenerationService, Job, ServiceClosed
from model.generate import Request
from model.sampling import SamplingOptions
from tests.ranks import PATIENCE


def test_closing_finishes_what_was_accepted_and_takes_nothing_more(directory: Path) -> None:
    generator = ModelDirectory.open(str(directory)).generator(device="cpu", max_rows=2)
    service = GenerationService(generator, max_rows=2, max_queue=2)
    requests = [Request([5, number + 6], SamplingOptions(temperature=0, max_new_tokens=9)) for number in range(3)]
    delivered: list[Any] = []
    service.submit(Job(requests, delivered.append))
    service.close(PATIENCE)
    assert delivered[-1] is None and len(delivered) == 3 * 9 + 1
    assert service.load == (0, 0)
    with pytest.raises(ServiceClosed):
        service.submit(Job(requests, delivered.append))
