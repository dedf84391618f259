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
    """Step `loop` over `requests`, of which it holds as many waiting as it looks ahead.

    What `requests` raises is raised here once those that it gave before have their results. Raises
    RuntimeError where the engine cannot go on.
    """
    source: RequestSource = (
        QueueSource(requests) if isinstance(requests, Queue) else IterableSource(requests)
    )
    error: Exception | None = None
    while not (loop.is_idle and source.ended):
        try:
            _fill(loop, source, lookahead)
        except Exception as raised:  # whatever makes the requests
            error, source.ended = raised, True
        yield from loop.step()
        if loop.failure:
            raise RuntimeError(f"no request can be served any more: {loop.failure}") from error
    if error is not None:
        raise error


def _fill(loop: ServingLoop, source: RequestSource, lookahead: int) -> None:
    """Submit what there is room for. Waits for a request where there is nothing else to do."""
    space = lookahead - len(loop.waiting)
    while space > 0 and (request := source.next(block=loop.is_idle)) is not None:
        loop.submit(request)
        space -= 1


class IterableSource:
    """Requests out of an iterable."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)
        self.ended = False

    def next(self, *, block: bool) -> Request | None:
        """The next request, or None at the end."""
        request = None if self.ended else next(self._requests, None)
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
