"""Ranks that do something which may fail on one of them, and must all learn of it.

A rank that raises while the others wait in a collective leaves them hanging. Here each rank does its work, then
all exchange how it went, and all raise the same error or none does. Messages travel over a gloo group of its
own, so they need no GPU and may run in a background thread beside the training's collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from engine.files import explain
from model.errors import InputError

T = TypeVar("T")

# Writing terabytes may take as long as it takes; the watchdog says when it is too long.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class _Failure:
    """What went wrong on a rank, in a form that travels."""

    rank: int
    message: str
    is_input_error: bool


class ControlGroup:
    """All ranks of the run, or the only process there is.

    Every method is a collective: all ranks call it, in the same order. One thread at a time may use a group.
    """

    def __init__(self) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if is_distributed else 0
        self.world: int = dist.get_world_size() if is_distributed else 1
        self.process_group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.world > 1 else None

    def each(self, doing: str, work: Callable[[], T]) -> T:
        """Every rank does `work`; returns this rank's result.

        Args:
            doing: the task in words that follow "cannot", such as "write runs/a".
        Raises:
            InputError: on all ranks, when an OSError or InputError ended the work of any of them.
            RuntimeError: on all ranks, when anything else did; the rank concerned raises its own error.
        """
        result, error = _attempt(work)
        failures = self.gather(None if error is None else self._describe(self.rank, error, doing))
        self._raise_first([failure for failure in failures if failure is not None], error)
        return cast(T, result)

    def first(self, doing: str, work: Callable[[], T]) -> T:
        """Rank 0 does `work`; its result, or its error, is every rank's. Raises as `each` does."""
        result, error = _attempt(work) if self.rank == 0 else (None, None)
        outcome = [(result, None if error is None else self._describe(0, error, doing))]
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.process_group)
        result, failure = outcome[0]
        self._raise_first([] if failure is None else [failure], error)
        return cast(T, result)

    def checkpointing(self, doing: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call `torch.distributed.checkpoint` with this group; it exchanges errors itself. Raises as `each` does."""
        try:
            return call(*args, **kwargs, process_group=self.process_group, no_dist=self.world == 1)
        except CheckpointException as exception:
            errors = {rank: error for rank, (error, _) in exception.failures.items()}
            failures = [self._describe(rank, error, doing) for rank, error in sorted(errors.items())]
            self._raise_first(failures, errors.get(self.rank), cause=exception)
            raise

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def _describe(self, rank: int, error: BaseException, doing: str) -> _Failure:
        if isinstance(error, InputError):
            return _Failure(rank, str(error), True)
        who = f"rank {rank} " if self.world > 1 else ""
        if isinstance(error, OSError):
            return _Failure(rank, f"{who}cannot {doing}: {explain(error)}", True)
        return _Failure(rank, f"{who}failed to {doing}: {type(error).__name__}: {error}", False)

    def _raise_first(
        self, failures: list[_Failure], own: BaseException | None, cause: BaseException | None = None
    ) -> None:
        if not failures:
            return
        if failures[0].is_input_error:
            raise InputError(failures[0].message) from own
        error = own or RuntimeError(failures[0].message)
        if cause is not None:
            raise error from cause  # DCP's exception holds the tracebacks of the ranks that failed
        raise error


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # whatever it is, the other ranks must hear of it before it goes on
        return None, error
