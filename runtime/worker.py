"""One generation at a time in a thread of its own; a bounded number of others waits its turn.

The event loop stays free: it answers health checks and notices disconnects while the model works.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, Lock

from holdfast.runtime.generate import Piece


class QueueFullError(Exception):
    """As many answers are being made or waited for as the worker admits."""


@dataclass(eq=False)
class Job:
    """An answer in the making: iterate over it in the event loop, cancel it at any time."""

    source: Iterator[Piece]
    loop: asyncio.AbstractEventLoop
    arrived: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    cancelled: Event = field(default_factory=Event)
    future: Future[None] | None = None

    def cancel(self) -> None:
        """Give the place back: at once while waiting, at the next token while running."""
        self.cancelled.set()
        if self.future is not None:
            self.future.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces up to the last one; raises what the generation raised."""
        while True:
            item = await self.arrived.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish is not None:
                return

    def run(self) -> None:
        """The worker thread's part."""
        try:
            for piece in self.source:
                if self.cancelled.is_set():
                    return
                self._hand_over(piece)
        except Exception as error:  # whatever it is, the waiting task has to get it and raise it
            self._hand_over(error)

    def _hand_over(self, item: Piece | Exception) -> None:
        self.loop.call_soon_threadsafe(self.arrived.put_nowait, item)


class Worker:
    """The thread that runs the model.

    Arguments:
        queue_size: answers that may wait while one is being made.
    """

    def __init__(self, queue_size: int) -> None:
        self._places = queue_size + 1
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="holdfast-generate")
        self._jobs: set[Job] = set()
        self._lock = Lock()  # jobs enter in the event loop and leave in the worker thread

    @property
    def open_jobs(self) -> int:
        """Answers being made or waiting."""
        return len(self._jobs)

    def submit(self, source: Iterator[Piece]) -> Job:
        """Start an answer, or put it in the queue; call in the event loop.

        Raises:
            QueueFullError: no place is left.
        """
        job = Job(source, asyncio.get_running_loop())
        with self._lock:
            if len(self._jobs) >= self._places:
                raise QueueFullError
            self._jobs.add(job)
        job.future = self._thread.submit(job.run)
        job.future.add_done_callback(lambda _: self._leave(job))
        return job

    def close(self) -> None:
        """Cancel everything and wait for the running answer's current token."""
        for job in list(self._jobs):
            job.cancel()
        self._thread.shutdown(wait=True)

    def _leave(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)
