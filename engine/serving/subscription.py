"""A job's events, from the service's thread to the event loop that serves its client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from engine.serving.service import Deliver, GenerationService, Job, Scored
from model.generate import Event, Request


class Subscription:
    """A job that was accepted; iterate over what it says, and close it whatever happens.

    Raises:
        InputError, QueueFull, ServiceClosed: as `GenerationService.submit`.
    """

    def __init__(
        self, service: GenerationService, requests: Sequence[Request], top: int | None = None, writes: bool = True
    ) -> None:
        self._service = service
        self._events: asyncio.Queue[Event | Scored | Exception | None] = asyncio.Queue()
        self._job = Job(requests, self._deliver_to(asyncio.get_running_loop()), top, writes)
        service.submit(self._job)

    def _deliver_to(self, loop: asyncio.AbstractEventLoop) -> Deliver:
        def deliver(item: Event | Scored | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is over: nobody is there to be told
                loop.call_soon_threadsafe(self._events.put_nowait, item)

        return deliver

    async def __aiter__(self) -> AsyncIterator[Event | Scored]:
        while (item := await self._events.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Give up what is not there yet."""
        self._service.cancel(self._job)
