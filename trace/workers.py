"""Ray actors that trace, each with a copy of the model: `python -m trace.collect --workers N`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from routing.cluster import connect, errors_as_here, gpus_of_worker, start_workers
from trace.models import build_runner, load_model
from trace.recorder import Recorder
from trace.settings import CollectSettings

if TYPE_CHECKING:
    from routing.shards import Document
    from trace.runner import BatchTracer
    from trace.sources import Prompt

DEPTH = 4
"""Batches queued at a worker, the running one included."""


class Worker:
    """An actor with a model that traces batches."""

    def __init__(self, settings: CollectSettings) -> None:
        self._settings = settings
        self._recorder: Recorder | None = None

    def run(self, batch: list[Prompt]) -> list[dict[str, Document]]:
        """Trace `batch`. The first call loads the model, so that its errors reach the caller."""
        if self._recorder is None:
            model = load_model(self._settings)
            self._runner = build_runner(model, self._settings)
            lookahead, extras = self._runner.lookahead, self._runner.extras
            self._recorder = Recorder(model, lookahead=lookahead, extras=extras).__enter__()
        seed = self._settings.seed + batch[0].number
        return self._runner.run(self._recorder, batch, seed=seed)


@contextmanager
def ray_workers(settings: CollectSettings) -> Iterator[BatchTracer]:
    """A tracer of batches on Ray workers, which end with the context.

    Raises ValueError if Ray is missing or the cluster too small, and whatever a worker raises. The
    batches of a worker that died go to its replacement.
    """
    ray = connect()
    gpus = gpus_of_worker(settings.device)
    workers = start_workers(
        Worker, settings.workers, settings, cpus=settings.worker_cpus, gpus=gpus
    )

    def run(batches: Iterator[list[Prompt]]) -> Iterator[tuple[list[Prompt], Any]]:
        in_flight: deque[tuple[list[Prompt], Any]] = deque()
        for number, batch in enumerate(batches):
            in_flight.append((batch, workers[number % len(workers)].run.remote(batch)))
            if len(in_flight) == DEPTH * len(workers):
                yield _finish(*in_flight.popleft())
        while in_flight:
            yield _finish(*in_flight.popleft())

    def _finish(batch: list[Prompt], traced: Any) -> tuple[list[Prompt], Any]:
        with errors_as_here():
            return batch, ray.get(traced)

    try:
        yield run
    finally:
        for worker in workers:
            ray.kill(worker)
