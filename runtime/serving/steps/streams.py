"""Streams: what the thread of the steps has for coroutines, in whichever event loop they run."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from runtime.serving.request import Delta, Request, Result
from runtime.serving.steps.failures import reason_of

Item = Delta | Result


class QueueFull(Exception):
    """As many requests are open as the server takes; none of those asked for was taken."""

    def __init__(self, most: int, retry_after: int) -> None:
        super().__init__(f"{most} requests are open already; try again in {retry_after} s")
        self.retry_after = retry_after
        """Whole seconds after which a place may be free."""


class Mailbox:
    """What the thread of the steps has for one request, in the event loop that waits for it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.events = asyncio.get_running_loop()
        self.items: asyncio.Queue[Item] = asyncio.Queue()

    def told(self, post: Post) -> Request:
        """The request, whose tokens come here as well, by `post`."""
        given = self.request.on_token

        def on_token(delta: Delta) -> None:
            if given is not None:
                try:
                    given(delta)
                except BaseException as error:  # SystemExit would end the thread, and all requests
                    raise ValueError(f"on_token failed: {reason_of(error)}") from error
            post.put(self, delta)

        return replace(self.request, on_token=on_token)


class Post:
    """Items for mailboxes, from one thread. An event loop is woken once for all that a step has for
    it: to wake it takes longer than to choose a token.
    """

    def __init__(self) -> None:
        self._items: defaultdict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Item]]]
        self._items = defaultdict(list)

    def put(self, mailbox: Mailbox, item: Item) -> None:
        """To be delivered."""
        self._items[mailbox.events].append((mailbox, item))

    def deliver(self) -> set[Mailbox]:
        """Deliver all; returns the mailboxes whose event loop is closed, where nobody waits."""
        lost = set()
        for events in list(self._items):
            items = self._items.pop(events)
            try:
                events.call_soon_threadsafe(_fill, items)
            except RuntimeError:
                lost |= {mailbox for mailbox, _ in items}
        return lost


def _fill(items: Sequence[tuple[Mailbox, Item]]) -> None:
    for mailbox, item in items:
        mailbox.items.put_nowait(item)


class Stream:
    """Each token of one request, then its result: an asynchronous iterator.

    It belongs to the event loop that it was opened in. Closing it, or dropping it, cancels the
    request.
    """

    def __init__(self, mailbox: Mailbox, cancel: Callable[[Mailbox], None]) -> None:
        self._mailbox, self._cancel = mailbox, cancel
        self._has_ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        if self._has_ended:
            raise StopAsyncIteration
        item = await self._mailbox.items.get()
        self._has_ended = self._has_ended or isinstance(item, Result)
        return item

    async def result(self) -> Result:
        """The end of the request. Cancelling the coroutine cancels the request."""
        try:
            async for item in self:
                if isinstance(item, Result):
                    return item
            raise RuntimeError(f"request {self._mailbox.request.id!r} gave its result already")
        finally:
            self.close()

    def close(self) -> None:
        """Cancel the request unless it has ended."""
        if not self._has_ended:
            self._has_ended = True
            self._cancel(self._mailbox)

    async def aclose(self) -> None:
        """The same, for `contextlib.aclosing`."""
        self.close()

    __del__ = close
