"""The stream of events at /v1/expertflow/events: server-sent events about the steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from runtime.server.live.feed import Feed

SILENCE = 15.0
"""Seconds of silence after which a comment shows that the connection is alive."""


class WatchResponse(StreamingResponse):
    """Events until the client leaves or `is_over` says so; the feed is watched meanwhile."""

    def __init__(self, feed: Feed, is_over: Callable[[], bool]) -> None:
        """Raises Refused where too many watch."""
        feed.join()
        self._leave = feed.leave
        super().__init__(
            _events(feed, is_over),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _events(feed: Feed, is_over: Callable[[], bool]) -> AsyncIterator[str]:
    yield f"retry: 1000\nevent: topology\ndata: {feed.topology()}\n\n"
    number, told = 0, time.monotonic()
    while not is_over():
        data, number = feed.step(after=number)
        if data:
            yield f"event: step\ndata: {data}\n\n"
            told = time.monotonic()
        elif time.monotonic() - told > SILENCE:
            yield ": nothing runs\n\n"
            told = time.monotonic()
        await asyncio.sleep(feed.interval)
