"""`engine.serve`: requests from an iterable or a queue, results as they end."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from queue import Empty, Queue
from typing import Any

from runtime.engine.engine import Engine
from runtime.serving.inputs.items import items_of
from runtime.serving.inputs.tokenizer import own_tokenizer
from runtime.serving.request import Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from runtime.serving.steps.failures import reason_of, refusal

Requests = Iterable[Any] | Queue[Any]
"""Of what `Request.of` takes."""

ABSENT: Any = object()
"""No request."""


def serve(
    engine: Engine, requests: Requests, tokenizer: Any, settings: ServeSettings
) -> Iterator[Result]:
    """Serve until the requests end and all have their result. Raises ValueError at once."""
    tokenizer = own_tokenizer(engine.model) if tokenizer is None else tokenizer
    source = requests if isinstance(requests, Queue) else items_of(requests)
    return _warning(run(ServingLoop(engine, tokenizer, settings), source, settings.lookahead))


def run(loop: ServingLoop, requests: Requests, lookahead: int) -> Iterator[Result]:
    """Step `loop` over `requests`, of which it holds as many waiting as it looks ahead.

    What `requests` raises is raised here once those that it gave before have their results. Raises
    RuntimeError where the engine cannot go on.
    """
    source: RequestSource = (
        QueueSource(requests) if isinstance(requests, Queue) else IterableSource(requests)
    )
    error: Exception | None = None
    try:
        while not (loop.is_idle and source.ended):
            try:
                yield from _fill(loop, source, lookahead)
            except Exception as raised:  # whatever makes the requests
                error, source.ended = raised, True
            yield from loop.step()
            if loop.failure:
                raise RuntimeError(f"no request can be served any more: {loop.failure}") from error
    finally:
        loop.cancel_all()  # whoever stops asking for results leaves no rows behind
    if error is not None:
        raise error


def _fill(loop: ServingLoop, source: RequestSource, lookahead: int) -> Iterator[Result]:
    """Submit what there is room for. Waits for a request where there is nothing else to do.

    Yields the refusals of what makes no request.
    """
    space = lookahead - len(loop.waiting)
    while space > 0 and (item := source.next(block=loop.is_idle)) is not ABSENT:
        try:
            loop.submit(Request.of(item))
            space -= 1
        except ValueError as error:
            yield refusal(item, reason_of(error), "request")


class IterableSource:
    """Requests out of an iterable."""

    def __init__(self, requests: Iterable[Any]) -> None:
        self._requests = iter(requests)
        self.ended = False

    def next(self, *, block: bool) -> Any:
        """The next item, or ABSENT at the end."""
        item = ABSENT if self.ended else next(self._requests, ABSENT)
        self.ended = item is ABSENT
        return item


class QueueSource:
    """Requests out of a queue, which None ends."""

    def __init__(self, requests: Queue[Any]) -> None:
        self._requests = requests
        self.ended = False

    def next(self, *, block: bool) -> Any:
        """The next request, or ABSENT where there is none now; `block` waits for one."""
        if self.ended:
            return ABSENT
        try:
            request = self._requests.get(block)
        except Empty:
            return ABSENT
        self.ended = request is None
        return ABSENT if self.ended else request


def _warning(results: Iterator[Result]) -> Iterator[Result]:
    """`results`, with a warning for each error: who reads only the text sees it too."""
    for result in results:
        if result.finish == "error":
            warnings.warn(f"{result.id} ended with an error: {result.error}", stacklevel=2)
        yield result


RequestSource = IterableSource | QueueSource
