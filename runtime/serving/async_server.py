"""Serving for asyncio: the steps run in a thread of their own."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from runtime.engine.engine import Engine
from runtime.serving.inputs.items import items_of
from runtime.serving.inputs.tokenizer import own_tokenizer
from runtime.serving.request import Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from runtime.serving.steps.failures import reason_of, refusal
from runtime.serving.steps.streams import Mailbox, Post, QueueFull, Stream

CLOSED = "the server is shutting down"
POLL = 0.02
"""Seconds between two looks at what is left, while a server ends gracefully."""

__all__ = ["AsyncServer", "QueueFull", "Stream"]
log = logging.getLogger(__name__)


class AsyncServer:
    """`async with AsyncServer(engine, tokenizer=...) as server`: requests from coroutines.

    Leaving the block cancels what is still in flight. max_queue: requests that may be open at once;
    None takes all. The settings are those of `ServeSettings`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokenizer: Any = None,
        max_queue: int | None = None,
        **settings: Any,
    ) -> None:
        if max_queue is not None and max_queue < 1:
            raise ValueError(f"max_queue={max_queue}: give at least 1")
        self.engine, self.max_queue = engine, max_queue
        within = ServeSettings.within(engine.key_value_storage, **settings)
        tokenizer = own_tokenizer(engine.model) if tokenizer is None else tokenizer
        self.loop = ServingLoop(engine, tokenizer, within)
        self._ahead = within.lookahead + within.rows
        self._open: dict[str, Mailbox] = {}
        self._post = Post()
        self._lock = threading.Lock()
        """Guards the mailboxes and the end: whatever is submitted before the end is ended."""
        self._wake, self._is_closed, self._stop, self._failure = threading.Event(), False, False, ""
        self._thread = threading.Thread(target=self._run, name="expertflow-steps", daemon=True)

    @property
    def failure(self) -> str:
        """The error that no request can be served after; empty while they can."""
        return self._failure or self.loop.failure

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def open(self, items: Sequence[Any]) -> list[Stream]:
        """Submit all of the requests, or none; from then on each holds a place in the queue.

        items: of what `Request.of` takes. Raises QueueFull, ValueError for what makes no request
        or has an id that is in flight, and RuntimeError where no request can be served: not yet,
        not any more, or not outside of an event loop.
        """
        requests = [Request.of(item) for item in items]
        mailboxes = [Mailbox(request) for request in requests]
        told = [mailbox.told(self._post) for mailbox in mailboxes]
        with self._lock:
            self._refuse(requests)
            self._open.update({mailbox.request.id: mailbox for mailbox in mailboxes})
            for request in told:
                self.loop.submit(request)
        self._wake.set()
        return [Stream(mailbox, self._cancel) for mailbox in mailboxes]

    def _refuse(self, requests: Sequence[Request]) -> None:
        if self.failure or self._is_closed:
            raise RuntimeError(f"no request can be served any more: {self.failure or CLOSED}")
        if self._thread.ident is None:
            raise RuntimeError("the server has not started: use `async with AsyncServer(...)`")
        seen = set(self._open)
        for request in requests:
            if request.id in seen:
                raise ValueError(f"a request with the id {request.id!r} is in flight already")
            seen.add(request.id)
        if self.max_queue is not None and len(seen) > self.max_queue:
            raise QueueFull(self.max_queue, self._retry_after())

    def _retry_after(self) -> int:
        """Whole seconds between two requests' ends, so far."""
        ended = sum(tuple(self.loop.finished.values()))
        return max(1, math.ceil(self.loop.seconds / ended)) if ended else 1

    def stream(self, request: Any) -> Stream:
        """Submit `request`: each token of it, then its result. Raises as `open` does."""
        return self.open([request])[0]

    async def complete(self, request: Any) -> Result:
        """The end of `request`. Cancelling the coroutine cancels the request."""
        return await self.stream(request).result()

    async def serve(self, requests: Iterable[Any]) -> AsyncIterator[Result]:
        """All `requests` together, read as far as admission looks ahead; results as they end.

        requests: as in `engine.serve`. What makes no request is a result with an error.

        An iterable that raises ends the requests, but not those that it gave before.
        """
        source: Iterator[Any] | None = iter(items_of(requests))
        error: Exception = StopIteration()
        pending: set[asyncio.Task[Result]] = set()
        try:
            while True:
                while source is not None and len(pending) < self._ahead and self._has_room:
                    try:
                        item = next(source)
                    except Exception as ended:
                        source, error = None, ended
                        break
                    try:
                        stream = self.stream(item)
                    except ValueError as refused:
                        yield refusal(item, reason_of(refused), "request")
                    except RuntimeError as ended:
                        source, error = None, ended
                    else:
                        pending.add(asyncio.create_task(stream.result()))
                if pending:
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
                elif source is None:
                    break
                else:
                    await asyncio.sleep(POLL)
        finally:
            for task in pending:
                task.cancel()
        if not isinstance(error, StopIteration):
            raise error

    @property
    def _has_room(self) -> bool:
        return self.max_queue is None or self.num_open < self.max_queue

    def _cancel(self, mailbox: Mailbox) -> None:
        """End a request that nobody waits for any more."""
        if self._open.get(mailbox.request.id) is mailbox:
            self.loop.cancel(mailbox.request.id)
            self._wake.set()

    # ------------------------------------------------------------------ start and end

    async def __aenter__(self) -> Self:
        if self._thread.ident is not None:
            raise RuntimeError("the server was started before; make another")
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self, grace: float = 0.0) -> None:
        """Take no more requests, let those in flight run for up to `grace` seconds, and cancel the
        rest: each gets its result. Idempotent.
        """
        with self._lock:
            self._is_closed = True
        if self._thread.ident is None:
            return
        until = time.monotonic() + grace
        while self._open and time.monotonic() < until:
            await asyncio.sleep(POLL)
        self._stop = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while not (self._stop or self.loop.failure):
                self._wake.wait()
                self._wake.clear()
                while not (self._stop or self.loop.is_idle):
                    self._publish(self.loop.step())
            with self._lock:
                self._is_closed = True
            self._publish(self.loop.cancel_all(self.loop.failure or CLOSED))
        except BaseException as error:  # every caller must hear of it, whatever it is
            log.critical("the thread of the steps failed", exc_info=error)
            self._failure = reason_of(error)
            self._fail_all()

    def _fail_all(self) -> None:
        """Give every open request its end, even where the loop cannot."""
        with self._lock:
            self._is_closed = True
        try:
            self._publish(self.loop.fail_all(self._failure))
        except BaseException as error:
            log.critical("the requests in flight cannot be ended in order", exc_info=error)
        rest = [refusal(one.request, self._failure, "server") for one in self._open.values()]
        self._publish(rest)

    def _publish(self, results: Sequence[Result]) -> None:
        """Deliver what a step has: its tokens, and these results."""
        for result in results:
            with self._lock:
                mailbox = self._open.pop(result.id, None)
            if mailbox is not None:
                self._post.put(mailbox, result)
        for mailbox in self._post.deliver():
            log.info("nobody waits for request %s any more", mailbox.request.id)
            self._cancel(mailbox)
