"""One text beside one viewer, measured between two of its tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.live_page.processes import browser_seconds, process_seconds, thread_seconds
from benchmarks.live_page.server import Server, complete, generated
from benchmarks.live_page.settings import LivePageSettings
from benchmarks.live_page.viewers import Browser, browsing, reading

EDGE = 20
"""Tokens at either end of a text that do not count."""
POLL = 0.5
PATIENCE = 120.0


class Moment(NamedTuple):
    """The clocks of one moment."""

    tokens: int
    wall: float
    server: float
    http: float
    browser: dict[str, float]


@dataclass
class Watched:
    """A server beside one viewer."""

    server: Server
    settings: LivePageSettings
    viewer: str
    browser: Browser | None = field(default=None)

    def moment(self, reached: int) -> Moment:
        """The first moment at which so many tokens have been generated."""
        until = time.monotonic() + PATIENCE
        while (tokens := generated(self.server)) < reached:
            if time.monotonic() > until:
                raise RuntimeError(f"{self.viewer}: the text did not go on")
            time.sleep(POLL)
        pid = self.server.pid
        return Moment(
            tokens, time.perf_counter(), process_seconds(pid), thread_seconds(pid),
            browser_seconds(self.browser.pid) if self.browser else {},
        )  # fmt: skip

    def text(self, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """One text. between: called in the middle of it, where the measurement ends early."""
        start = generated(self.server)
        with self._asked():
            first = self.moment(start + EDGE)
            between()
            last = self.moment(start + self.settings.tokens - EDGE)
        return measured(self.viewer, first, last)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """A text that runs meanwhile; it has ended after the block."""
        if self.viewer == "chat":
            assert self.browser is not None
            self.browser.say(self.settings)
            end = generated(self.server)
            yield
            self.moment(end)
            time.sleep(1.0)
            return
        thread = threading.Thread(target=complete, args=(self.server, self.settings))
        thread.start()
        yield
        thread.join(PATIENCE)


@contextmanager
def watched(server: Server, settings: LivePageSettings, viewer: str) -> Iterator[Watched]:
    """The server beside a viewer who is there for as long as the block lasts."""
    if viewer == "nobody":
        yield Watched(server, settings, viewer)
    elif viewer == "stream":
        with reading(server.address):
            yield Watched(server, settings, viewer)
    else:
        with browsing(server.address, settings) as browser:
            yield Watched(server, settings, viewer, browser)


def measured(viewer: str, first: Moment, last: Moment) -> dict[str, Any]:
    """What passed between two moments: tokens a second, and CPU seconds of each part a second."""
    seconds, tokens = last.wall - first.wall, last.tokens - first.tokens
    browser = {
        kind: (total - first.browser.get(kind, 0.0)) / seconds
        for kind, total in sorted(last.browser.items())
    }
    return {
        "viewer": viewer,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "server": (last.server - first.server) / seconds,
        "http": (last.http - first.http) / seconds,
        "browser": browser,
    }
