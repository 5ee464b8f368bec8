"""Processes and devices: what is set before the first of them computes."""

from __future__ import annotations

import os

import pytest

from engine.mesh import _let_segments_grow

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def test_segments_of_the_allocator_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever is set below
        monkeypatch.delenv(name)
    _let_segments_grow()
    assert os.environ[NAMES[0]] == "expandable_segments:True" and NAMES[1] not in os.environ


@pytest.mark.parametrize("name", NAMES)
def test_what_a_user_asks_of_the_allocator_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    _let_segments_grow()
    assert {other: os.environ.get(other) for other in NAMES} == {**dict.fromkeys(NAMES), name: "max_split_size_mb:512"}
