"""A server in a process of its own, and one text asked of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx2 as httpx

from benchmarks.live_page.settings import LivePageSettings

PATIENCE = 120.0
"""Seconds to wait for the server to be ready."""
GENERATED = re.compile(r"^expertflow_generated_tokens_total (\S+)", re.MULTILINE)


class Server(NamedTuple):
    """A server that answers."""

    address: str
    pid: int


@contextmanager
def serving(settings: LivePageSettings, port: int) -> Iterator[Server]:
    """A server of the model on a CPU. Raises RuntimeError where it does not come up."""
    words = [
        sys.executable, "-m", "runtime.server", "--device", "cpu", "--port", str(port),
        "--model", str(settings.model), "--predictor", str(settings.predictor),
        "--memory", str(settings.memory),
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}
    with subprocess.Popen(
        words, env=os.environ | threads, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, address)
            yield Server(address, process.pid)
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], address: str) -> None:
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError("the server does not answer; run its command by hand to see why")


def complete(server: Server, settings: LivePageSettings) -> None:
    """Ask for one text as a stream, and drop it."""
    asked = {"prompt": settings.prompt, "max_tokens": settings.tokens, "ignore_eos": True}
    body = asked | {"stream": True, "temperature": 0, "model": settings.model.name}
    with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=60) as answer:
        answer.raise_for_status()
        for _ in answer.iter_bytes():
            pass


def generated(server: Server) -> int:
    """Tokens that the server has generated since it started."""
    found = GENERATED.search(httpx.get(f"{server.address}/metrics").text)
    if found is None:
        raise RuntimeError("the server's metrics do not count tokens")
    return int(float(found[1]))
