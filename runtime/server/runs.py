"""Runs: the choices of one answer while they are generated, and how many there may be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request as HttpRequest

from runtime.server.errors import Refused, bad_request
from runtime.serving.async_server import AsyncServer
from runtime.serving.request import Delta, Request, Result

log = logging.getLogger(__name__)

DISCONNECT_POLL = 0.2
Item = tuple[int, Delta | Result]
"""A choice's number, and a token of it or its end."""

STOPPING = "the server is shutting down"


class Places:
    """Choices that may be in flight or waiting; counted before anything is awaited."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0

    def take(self, count: int) -> Callable[[], None]:
        """Places for `count` choices; what is returned gives them back. Raises Refused."""
        if count > self._most:
            asked = f"{count} choices are more than the {self._most} that this server holds"
            raise Refused(400, asked, param="n")
        if self._taken + count > self._most:
            raise Refused(429, "too many requests are waiting; try again later")
        self._taken += count
        left = [count]

        def give_back() -> None:
            self._taken -= left[0]
            left[0] = 0

        return give_back


class Run:
    """The choices of one answer."""

    def __init__(
        self,
        server: AsyncServer,
        requests: Sequence[Request],
        observe: Callable[[Result], None],
        fields: dict[str, Any],
        prompt_field: str,
    ) -> None:
        """observe: is told of each end. fields: of the body, for errors that name one.

        prompt_field: the one of the prompt.
        """
        self._observe = observe
        self._server, self._fields, self._prompt_field = server, fields, prompt_field
        self._items: asyncio.Queue[Item | BaseException] = asyncio.Queue()
        self._next_look = time.monotonic() + DISCONNECT_POLL
        self._tasks = [
            asyncio.create_task(self._read(index, request))
            for index, request in enumerate(requests)
        ]
        self.results: dict[int, Result] = {}

    @property
    def ended(self) -> bool:
        return len(self.results) == len(self._tasks)

    async def next(self, http: HttpRequest | None = None) -> Item:
        """The next token or end of a choice. Raises Refused.

        http: the connection to watch, which ends the run where it is closed.
        """
        item = await self._item(http)
        if isinstance(item, BaseException):
            raise item
        index, told = item
        if isinstance(told, Result):
            self._observe(told)
            self._check(told)
            self.results[index] = told
        return index, told

    async def _item(self, http: HttpRequest | None) -> Item | BaseException:
        if http is None:
            return await self._items.get()
        while True:
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + DISCONNECT_POLL
                if await http.is_disconnected():
                    raise Refused(499, "the client went away")
            with suppress(TimeoutError):
                async with asyncio.timeout(DISCONNECT_POLL):
                    return await self._items.get()

    def end(self, reason: Refused) -> None:
        """Let whoever waits for the next token have `reason` instead."""
        self._items.put_nowait(reason)

    async def close(self) -> None:
        """Cancel what still runs."""
        for task in self._tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check(self, result: Result) -> None:
        if result.finish == "cancelled":
            raise Refused(503, result.error or STOPPING)
        if result.finish != "error":
            return
        if result.fault == "server" or self._server.failure:
            raise Refused(500, result.error)
        raise bad_request(ValueError(result.error), self._fields, self._prompt_field)

    async def _read(self, index: int, request: Request) -> None:
        try:
            stream: Any = self._server.stream(request)
            async with aclosing(stream):
                async for item in stream:
                    self._items.put_nowait((index, item))
        except RuntimeError as error:  # nothing is served any more
            self._items.put_nowait(Refused(503, self._server.failure or str(error)))
        except Exception as error:  # whoever waits must hear of it
            log.exception("a request cannot be served")
            self._items.put_nowait(Refused(500, f"{type(error).__name__}: {error}"))
