"""A batch over Ray actors, each with the model: `python -m runtime.batch --workers N`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from routing.cluster import connect, errors_as_here, gpus_of_worker, start_workers
from runtime.serving.async_server import AsyncServer
from runtime.serving.batch.settings import (
    BatchSettings,
    Served,
    serve_settings,
)
from runtime.serving.request import Request


class Worker:
    """The actor: an engine whose steps take in requests as they are sent."""

    def __init__(self, settings: BatchSettings) -> None:
        self._settings = settings
        self._server: AsyncServer | None = None

    async def complete(self, request: Request) -> Served:
        """The end of `request`. The first loads the model, so that its errors can be told."""
        server = await self._open()
        result = await server.complete(request)
        return Served.by(server.engine.stats(), result)

    async def report(self) -> str:
        """One line about the run so far."""
        return (await self._open()).engine.report()

    async def _open(self) -> AsyncServer:
        if self._server is None:
            tokenizer = self._settings.read_tokenizer()
            engine = self._settings.load(tokenizer)
            options = serve_settings(self._settings)
            self._server = await AsyncServer(engine, tokenizer=tokenizer, **options).__aenter__()
        return self._server


class Crew:
    """The workers of one batch. Raises ValueError where Ray is missing or has too few cores."""

    def __init__(self, settings: BatchSettings) -> None:
        self._ray = connect()
        self._depth = settings.lookahead
        gpus, cpus = gpus_of_worker(settings.device), settings.worker_cpus
        self._workers = start_workers(Worker, settings.workers, settings, cpus=cpus, gpus=gpus)

    def serve(self, requests: Iterator[Request]) -> Iterator[Served]:
        """Results as they end. A worker holds as many requests as it looks ahead.

        Raises what a worker raises. What a worker held when it died goes to the one in its place.
        """
        free = deque(self._workers * self._depth)
        flying: dict[Any, Any] = {}
        while True:
            while free and (request := next(requests, None)) is not None:
                worker = free.popleft()
                flying[worker.complete.remote(request)] = worker
            if not flying:
                return
            for done in self._ray.wait(list(flying))[0]:
                free.append(flying.pop(done))
                with errors_as_here():
                    yield self._ray.get(done)

    def report(self) -> str:
        """A line a worker."""
        return "\n".join(self._ray.get([worker.report.remote() for worker in self._workers]))

    def close(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
