"""Tracing over Ray actors, each with the model: `python -m trace.collect --workers N`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from routing.cluster import connect, errors_as_here, start_workers
from trace.models import build_runner, load_model
from trace.recorder import Recorder
from trace.settings import CollectSettings

if TYPE_CHECKING:
    from routing.shards import Document
    from trace.runner import Run
    from trace.sources import Prompt

DEPTH = 4
"""Batches that a worker holds, the one it runs among them."""


class Worker:
    """The actor: a model that traces batches."""

    def __init__(self, settings: CollectSettings) -> None:
        self._settings = settings
        self._recorder: Recorder | None = None

    def run(self, batch: list[Prompt]) -> list[dict[str, Document]]:
        """The documents of `batch`. The first call loads the model, so its errors can be told."""
        if self._recorder is None:
            model = load_model(self._settings)
            self._runner = build_runner(model, self._settings)
            self._recorder = Recorder(model, lookahead=self._settings.lookahead).__enter__()
        seed = self._settings.seed + batch[0].number
        return self._runner.run(self._recorder, batch, seed=seed)


@contextmanager
def crew(settings: CollectSettings) -> Iterator[Run]:
    """Runs batches on workers; leaving the block ends them.

    Raises ValueError where Ray is missing or the cluster too small, and what a worker raises. What
    a worker held when it died goes to the one in its place.
    """
    ray = connect()
    gpus = int(settings.device.startswith("cuda"))
    workers = start_workers(
        Worker, settings.workers, settings, cpus=settings.worker_cpus, gpus=gpus
    )

    def run(batches: Iterator[list[Prompt]]) -> Iterator[tuple[list[Prompt], Any]]:
        flying: deque[tuple[list[Prompt], Any]] = deque()
        for number, batch in enumerate(batches):
            flying.append((batch, workers[number % len(workers)].run.remote(batch)))
            if len(flying) == DEPTH * len(workers):
                yield _land(*flying.popleft())
        while flying:
            yield _land(*flying.popleft())

    def _land(batch: list[Prompt], traced: Any) -> tuple[list[Prompt], Any]:
        with errors_as_here():
            return batch, ray.get(traced)

    try:
        yield run
    finally:
        for worker in workers:
            ray.kill(worker)
