"""The listening server, which stops in good order.

Told to stop, it takes no further requests, lets those in flight finish for some seconds, and then
ends each with a message to its client.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from runtime.server.settings import ServerSettings

FAREWELL = 5
"""Seconds for the last messages to reach their clients."""


class Listener(uvicorn.Server):
    """uvicorn over the application of `build_app`."""

    def __init__(self, app: FastAPI, settings: ServerSettings, **options: Any) -> None:
        """options: more of uvicorn's configuration."""
        self._handlers, self._engine = app.state.handlers, app.state.engine
        self._grace = settings.grace
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                timeout_graceful_shutdown=settings.grace + FAREWELL,
                **options,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._handlers.stop()
        ending = asyncio.get_running_loop().call_later(self._grace, self._handlers.end_all)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            logging.getLogger("uvicorn.error").info("served: %s", self._engine.report())
