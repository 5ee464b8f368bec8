"""Shared fixtures. Tests use one thread each, so that two workers share two cores without fighting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Before any kernel is imported: Triton decides then. Kernels run on the interpreter where a test asks for them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same draws in every run, so that a change alone turns a test red; `--hypothesis-profile default` draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real Chinese medical files beside the checkout; the test is skipped without it."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}")
    return REAL_DATA


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
