"""Viewers: nobody, a client of the events, and headless Chromium with the page.

The browser runs without a driver while it is measured. Playwright, which the tests install, is
there only for moments: to see that the page is live, to type into it, to take its picture.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2 as httpx

from benchmarks.live_page.settings import LivePageSettings

EVENTS = "/v1/expertflow/events"
FLAGS = (
    "--headless=new", "--no-sandbox", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-extensions", "--disable-sync", "--mute-audio",
    "--window-size=1280,900", "--remote-debugging-port=0",
)  # fmt: skip
PORT_FILE = "DevToolsActivePort"
PATIENCE = 30.0
SETTLED = 2.0
"""Seconds that a page is left alone before it counts."""


def check(settings: LivePageSettings) -> None:
    """Raise ValueError where a viewer lacks its program."""
    if not {"page", "chat"} & set(settings.viewers):
        return
    if find_spec("playwright") is None:
        raise ValueError("the viewers page and chat need playwright: pip install playwright")
    if shutil.which(settings.chromium) is None:
        raise ValueError(f"there is no {settings.chromium}: install Chromium, or name it")


@contextmanager
def reading(address: str) -> Iterator[None]:
    """A client reads the events and drops them, for as long as the block lasts."""
    over = threading.Event()

    def read() -> None:
        with suppress(httpx.TransportError), httpx.stream("GET", address + EVENTS) as answer:
            for _ in answer.iter_bytes():
                if over.is_set():
                    return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE)


class Browser:
    """Chromium with the page, in a process of its own."""

    def __init__(self, pid: int, port: int) -> None:
        self.pid = pid
        self._port = port

    @contextmanager
    def page(self) -> Iterator[Any]:
        """The page through Playwright, which lets go of it afterwards."""
        from playwright.sync_api import sync_playwright

        with sync_playwright() as driver:
            browser = driver.chromium.connect_over_cdp(f"http://127.0.0.1:{self._port}")
            yield browser.contexts[0].pages[0]

    def say(self, settings: LivePageSettings) -> None:
        """Ask for a text in the page's chat."""
        with self.page() as page:
            if not page.is_visible("#max_tokens"):
                page.click("#sampling summary")
            page.fill("#max_tokens", str(settings.tokens))
            page.fill("#temperature", "0")
            page.click("#sampling summary")
            page.fill("#prompt", settings.prompt)
            page.press("#prompt", "Enter")


@contextmanager
def browsing(address: str, settings: LivePageSettings) -> Iterator[Browser]:
    """A browser that shows the page of the server, once it is live."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        words = [settings.chromium, *FLAGS, f"--user-data-dir={folder}", address]
        process = stack.enter_context(subprocess.Popen(words, stderr=subprocess.DEVNULL))
        stack.callback(process.terminate)
        browser = Browser(process.pid, _port(Path(folder) / PORT_FILE))
        with browser.page() as page:
            page.wait_for_selector("#status[data-state=live]")
        time.sleep(SETTLED)
        yield browser


def _port(file: Path) -> int:
    """The port at which the browser can be spoken to."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if file.is_file() and (lines := file.read_text().split()):
            return int(lines[0])
        time.sleep(0.1)
    raise RuntimeError("the browser did not start")
