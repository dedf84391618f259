"""A run of a batch: the rows without a result, on their way through an engine or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from runtime.batch.jobs import Job, Jobs, Outcome
from runtime.batch.progress import Progress
from runtime.serving.batch.journal import Journal
from runtime.serving.batch.rows import Row
from runtime.serving.batch.settings import Served
from runtime.serving.request import Request, Result


class Crew(Protocol):
    """What serves requests: an engine, or workers."""

    def serve(self, requests: Iterator[Request]) -> Iterator[Served]:
        """Results as they end."""

    def report(self) -> str:
        """Lines about the run."""

    def close(self) -> None:
        """End it."""


@dataclass
class _Open:
    """A row in service, and the results of its requests that have ended."""

    row: Row
    job: Job
    results: dict[int, Result] = field(default_factory=dict)


class BatchRun:
    """Takes rows in and keeps their lines."""

    def __init__(self, jobs: Jobs, journal: Journal, progress: Progress) -> None:
        self._jobs, self._journal, self._progress = jobs, journal, progress
        self._open: dict[int, _Open] = {}

    def serve(self, crew: Crew, rows: Iterable[Row]) -> None:
        """Serve every row that has no result yet, and those that failed before."""
        for served in crew.serve(self._requests(rows)):
            self._progress.served(served)
            self._take(served.result)

    def _requests(self, rows: Iterable[Row]) -> Iterator[Request]:
        for index, row in enumerate(rows):
            if index in self._journal.done:
                continue
            job = self._jobs.of(index, row)
            if not isinstance(job, Job):
                self._keep(index, row, job)
                continue
            self._open[index] = _Open(row, job)
            for number, request in enumerate(job.requests):
                yield replace(request, id=f"{index}/{number}")

    def _take(self, result: Result) -> None:
        index, number = map(int, result.id.split("/"))
        served = self._open[index]
        served.results[number] = result
        if len(served.results) == len(served.job.requests):
            results = [served.results[at] for at in range(len(served.results))]
            self._keep(index, served.row, served.job.outcome(results))
            del self._open[index]

    def _keep(self, index: int, row: Row, outcome: Outcome) -> None:
        self._journal.add(index, outcome.line, failed=bool(outcome.error))
        self._progress.ended(index, row, outcome)
