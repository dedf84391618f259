"""Serving for asyncio: the steps run in a thread of their own."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self

from runtime.engine.engine import Engine
from runtime.serving.request import Delta, Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings

Item = Delta | Result


class AsyncServer:
    """`async with AsyncServer(engine, tokenizer=...) as server`: requests from coroutines.

    Leaving the block cancels what is still in flight. The settings are those of `ServeSettings`.
    """

    def __init__(self, engine: Engine, *, tokenizer: Any = None, **settings: Any) -> None:
        self.engine = engine
        within = ServeSettings.within(engine.key_value_storage, **settings)
        self.loop = ServingLoop(engine, tokenizer, within)
        self.failure = ""
        """The error that ended the steps; empty while they run."""
        self._streams: dict[str, asyncio.Queue[Item]] = {}
        self._wake, self._stop = threading.Event(), False
        self._failing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="expertflow-steps", daemon=True)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def complete(self, request: Request) -> Result:
        """The end of `request`. Cancelling the coroutine cancels the request."""
        async for item in self.stream(request):
            if isinstance(item, Result):
                return item
        raise AssertionError("a stream ends with its result")

    async def stream(self, request: Request) -> AsyncIterator[Item]:
        """Each token of `request`, then its result. Closing the iterator cancels the request."""
        if request.id in self._streams:
            raise ValueError(f"a request with the id {request.id!r} is in flight already")
        items: asyncio.Queue[Item] = asyncio.Queue()
        self._streams[request.id] = items
        ended = False
        try:
            self._submit(request)
            while not ended:
                item = await items.get()
                ended = isinstance(item, Result)
                yield item
        finally:
            del self._streams[request.id]
            if not ended:
                self._cancel(request.id)

    async def serve(self, requests: Iterable[Request]) -> AsyncIterator[Result]:
        """All `requests` together; results as they end."""
        tasks = [asyncio.create_task(self.complete(request)) for request in requests]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for task in tasks:
                task.cancel()

    async def __aenter__(self) -> Self:
        self._events = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def _submit(self, request: Request) -> None:
        told = request.on_token

        def on_token(delta: Delta) -> None:
            if told is not None:
                told(delta)
            self._events.call_soon_threadsafe(self._deliver, delta)

        with self._failing:
            if self.failure or self._stop:
                reason = self.failure or "the server is shutting down"
                raise RuntimeError(f"no request can be served any more: {reason}")
            self.loop.submit(dataclasses.replace(request, on_token=on_token))
        self._wake.set()

    def _cancel(self, request_id: str) -> None:
        self.loop.cancel(request_id)
        self._wake.set()

    def _deliver(self, item: Item) -> None:
        if item.id in self._streams:
            self._streams[item.id].put_nowait(item)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while not self._stop:
                self._wake.wait()
                self._wake.clear()
                while not (self._stop or self.loop.is_idle):
                    self._publish(self.loop.step())
            self._publish(self.loop.cancel_all())
        except Exception as error:  # a model can raise anything, and every caller must hear of it
            with self._failing:
                self.failure = f"{type(error).__name__}: {error}"
            self._publish(self.loop.fail_all(self.failure))

    def _publish(self, results: list[Result]) -> None:
        for result in results:
            self._events.call_soon_threadsafe(self._deliver, result)
