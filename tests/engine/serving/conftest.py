"""One model and one server for all tests that need no other."""

from __future__ import annotations

from collections.abc import Iterator
from logging import ERROR, LogRecord, getLogger
from pathlib import Path

import pytest

from tests.engine.serving.live import Alone, Live, served
from tests.tools.small_chat import write_small_chat_model


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_chat_model(tmp_path_factory.mktemp("serving") / "model")


@pytest.fixture(scope="package")
def alone(directory: Path) -> Alone:
    return Alone(directory)


@pytest.fixture(scope="package")
def live(directory: Path) -> Iterator[Live]:
    with served(directory) as running:
        yield running


@pytest.fixture
def nothing_fails() -> Iterator[None]:
    """Of servers: neither the application nor a connection has raised."""
    failures: list[str] = []

    def keep(record: LogRecord) -> bool:
        if record.levelno >= ERROR:
            failures.append(record.getMessage())
        return True

    # Filters, as a server that starts takes handlers away.
    loggers = [getLogger("uvicorn.error"), getLogger("asyncio")]
    for logger in loggers:
        logger.addFilter(keep)
    yield
    for logger in loggers:
        logger.removeFilter(keep)
    assert failures == []
