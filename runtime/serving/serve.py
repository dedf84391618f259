"""`engine.serve`: requests from an iterable or a queue, results as they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Empty, Queue
from typing import Any

from runtime.engine.engine import Engine
from runtime.serving.request import Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings

Requests = Iterable[Request] | Queue[Request | None]


def serve(
    engine: Engine, requests: Requests, tokenizer: Any, settings: ServeSettings
) -> Iterator[Result]:
    """Serve until the requests end and all have their result. Raises ValueError at once."""
    return run(ServingLoop(engine, tokenizer, settings), requests, settings.lookahead)


def run(loop: ServingLoop, requests: Requests, lookahead: int) -> Iterator[Result]:
    """Step `loop` over `requests`, of which it holds as many waiting as it looks ahead."""
    source: RequestSource = (
        QueueSource(requests) if isinstance(requests, Queue) else IterableSource(requests)
    )
    try:
        while True:
            space = lookahead - len(loop.waiting)
            while space > 0 and (request := source.next(block=loop.is_idle)) is not None:
                loop.submit(request)
                space -= 1
            if loop.is_idle and source.ended:
                return
            yield from loop.step()
    finally:
        loop.cancel_all()  # whoever stops asking for results leaves no rows behind


class IterableSource:
    """Requests out of an iterable."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)
        self.ended = False

    def next(self, *, block: bool) -> Request | None:
        request = next(self._requests, None)
        self.ended = request is None
        return request


class QueueSource:
    """Requests out of a queue, which None ends."""

    def __init__(self, requests: Queue[Request | None]) -> None:
        self._requests = requests
        self.ended = False

    def next(self, *, block: bool) -> Request | None:
        """The next request, or None where there is none now; `block` waits for one."""
        if self.ended:
            return None
        try:
            request = self._requests.get(block)
        except Empty:
            return None
        self.ended = request is None
        return request


RequestSource = IterableSource | QueueSource
