"""The command: a data set in, a file of results out, and an exit code that tells of failed rows."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import wrap
from types import FrameType
from typing import TYPE_CHECKING, Any

from runtime.serving.batch.settings import BatchSettings

if TYPE_CHECKING:
    from runtime.batch.batch_run import Crew
    from runtime.batch.survey import Survey

PROG = "python -m runtime.batch"
EXIT_ROWS_FAILED = 3
EXIT_TERMINATED = 143
IDENTITY = (
    "model", "dtype", "max_tokens", "temperature", "top_p", "seed", "stop", "context",
    "chat_template", "name", "revision", "attn_implementation",
)  # fmt: skip
"""Settings that a batch's results depend on."""


def main(settings: BatchSettings) -> None:
    """Serve every row that has no result yet, then put the results in order.

    Exits with 3 where rows failed.
    """
    from runtime.batch.survey import survey
    from runtime.serving.batch.journal import Journal
    from runtime.serving.batch.rows import rows_of

    with _dataset(settings) as (name, format), _termination():
        rows = partial(rows_of, name, settings.split, format)
        found = survey(rows(), settings.ignore)
        if found.num_rows == 0:
            raise ValueError(f"the data set {settings.dataset} has no rows")
        identity = {"rows": found.digest} | {n: asdict(settings)[n] for n in IDENTITY}
        with Journal(settings.out, identity, retry_failed=settings.retry_failed) as journal:
            _serve(settings, rows, found, journal)
            num_failed = len(journal.failed)
    if num_failed:
        raise SystemExit(EXIT_ROWS_FAILED)


def _serve(settings: BatchSettings, rows: Any, found: Survey, journal: Any) -> None:
    from runtime.batch.batch_run import BatchRun
    from runtime.batch.course import draw_course
    from runtime.batch.jobs import Jobs
    from runtime.batch.lengths import sampled_lengths
    from runtime.batch.progress import Progress, announce
    from runtime.batch.sequences import sized
    from runtime.batch.survey import unchanged

    tokenizer = settings.read_tokenizer()
    jobs = Jobs(settings, tokenizer, has_openai=found.has_openai)
    announce(found.num_rows, journal)
    summary = [f"{settings.out}: {found.num_rows} rows, all of them done before"]
    if len(journal.done) < found.num_rows:
        lengths = partial(sampled_lengths, rows(), found.num_rows, jobs, tokenizer, journal.done)
        settings = sized(settings, found.num_rows - len(journal.done), lengths)
        with (
            closing(_crew(settings, tokenizer)) as crew,
            Progress(settings.out, found.num_rows, journal, max(settings.workers, 1)) as progress,
        ):
            run = BatchRun(jobs, journal, progress)
            run.serve(crew, unchanged(rows(), found.digest))
            summary = [progress.summary, crew.report()]
            if settings.plot is not None:
                draw_course(progress.course, "\n".join(wrap(summary[1], 110)), settings.plot)
                summary.append(f"picture: {settings.plot}")
    journal.finish()
    print(*summary, sep="\n", file=sys.stderr)
    if journal.failed:
        print(f"--retry-failed serves the failed rows again: {journal.path}", file=sys.stderr)


def _crew(settings: BatchSettings, tokenizer: Any) -> Crew:
    if not settings.workers:
        from runtime.serving.batch.local import LocalWorker

        return LocalWorker(settings, tokenizer)
    from runtime.serving.batch.ray_workers import Crew as Workers

    return Workers(settings)


@contextmanager
def _dataset(settings: BatchSettings) -> Iterator[tuple[str, str | None]]:
    """The data set's name and format; standard input as a file that can be read again."""
    from runtime.serving.batch.files import STDIN, keep_stdin

    if settings.dataset != STDIN:
        yield settings.dataset, settings.format
        return
    with tempfile.TemporaryDirectory(prefix="expertflow-") as folder:
        yield str(keep_stdin(Path(folder))), settings.format or "jsonl"


@contextmanager
def _termination() -> Iterator[None]:
    """Within it, a termination ends the command as orderly as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
