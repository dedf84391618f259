"""Answers as server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from runtime.server.errors import Refused
from runtime.server.protocol.answers import Answer
from runtime.server.runs import Run
from runtime.serving.request import Delta, Result

log = logging.getLogger(__name__)
First = tuple[int, Delta | Result]


class EventResponse(StreamingResponse):
    """The events of a run. Whatever ends the connection ends the run."""

    def __init__(
        self,
        run: Run,
        answer: Answer,
        first: First,
        close: Callable[[], Awaitable[None]],
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            _events(run, answer, first),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers,
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def _events(run: Run, answer: Answer, first: First) -> AsyncIterator[str]:
    """What comes too late for a status is an event with the error, after which nothing comes."""
    try:
        for event in answer.first_events():
            yield _event(event)
        item = first
        while True:
            for event in answer.events(*item):
                yield _event(event)
            if run.ended:
                break
            item = await run.next()
        for event in answer.closing([run.results[index] for index in sorted(run.results)]):
            yield _event(event)
        yield "data: [DONE]\n\n"
    except Refused as refused:
        yield _event(refused.body)
    except Exception:
        log.exception("a streamed answer failed")
        yield _event(Refused(500, "the server failed to answer; its log has the reason").body)


def _event(data: Any) -> str:
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"
