"""A client of the server's events about its steps."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import numpy as np

EVENTS = "/v1/expertflow/events"
Event = tuple[str, dict[str, Any]]


@contextmanager
def watching(address: str, **headers: str) -> Iterator[Iterator[Event]]:
    """The events of a server, as (name, data), for as long as the block lasts."""
    with httpx.stream("GET", address + EVENTS, headers=headers, timeout=20) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield _events(response.iter_lines())


def _events(lines: Iterator[str]) -> Iterator[Event]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        if line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def flags(bitmap: str, shape: tuple[int, int]) -> np.ndarray:
    """Bool [L, E] of a bitmap of an event."""
    packed = np.frombuffer(base64.b64decode(bitmap), np.uint8)
    count = shape[0] * shape[1]
    return np.unpackbits(packed, count=count, bitorder="little").astype(bool).reshape(shape)
