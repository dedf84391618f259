"""The progress of a batch: a bar while it runs, errors by their rows, counts at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from runtime.batch.course import Moment
from runtime.batch.jobs import Outcome
from runtime.serving.batch.journal import Journal
from runtime.serving.batch.rows import Row
from runtime.serving.batch.settings import Served
from runtime.sizing.units import format_bytes


def announce(num_rows: int, journal: Journal) -> None:
    """Tell what an interrupted batch, or one whose failed rows are served again, has already."""
    if journal.done or journal.failed:
        again = f"; {len(journal.failed)} that failed are served again" if journal.failed else ""
        print(
            f"{journal.path}: going on, {len(journal.done)} of {num_rows} rows are done{again}",
            file=sys.stderr,
        )


class Progress:
    """Counts of the rows of `out`: done before, done now, failed.

    num_engines: that serve them; each is taken to move as many bytes as the one heard of last.
    """

    def __init__(self, out: Path, num_rows: int, journal: Journal, num_engines: int) -> None:
        self._out, self._num_rows, self._journal = out, num_rows, journal
        self._before, self._num_engines = len(journal.done), num_engines
        self._num_tokens = 0
        self.course: list[Moment] = []
        self._bar = tqdm(total=num_rows, initial=self._before, unit="row", desc="batch")

    def ended(self, index: int, row: Row, outcome: Outcome) -> None:
        """Count a row, and tell its error."""
        if outcome.error:
            id = row.data.get("custom_id", row.data.get("id")) if isinstance(row.data, dict) else ""
            name = f" ({row.place}, id {id})" if id else f" ({row.place})"
            self._bar.write(f"row {index}{name}: {outcome.error}", file=sys.stderr)
        self._bar.update()

    def served(self, served: Served) -> None:
        """Tell the speed so far, and what every token has moved."""
        self._num_tokens += served.result.num_prompt + len(served.result.token_ids)
        seconds, moved = self._bar.format_dict["elapsed"], served.bytes_loaded * self._num_engines
        self.course.append(Moment(seconds, self._num_tokens, served.hit_rate, moved))
        rate = self._num_tokens / max(seconds, 1e-9)
        each = format_bytes(moved // max(self._num_tokens, 1))
        self._bar.set_postfix_str(
            f"{rate:.1f} tok/s, hit rate {served.hit_rate:.1%}, {each} a token"
        )

    @property
    def summary(self) -> str:
        done, failed = len(self._journal.done), len(self._journal.failed)
        now = f"{done - self._before} rows done now"
        before = f"{self._before} before, " if self._before else ""
        left = self._num_rows - done - failed
        unserved = f", {left} not yet served" if left else ""
        return f"{self._out}: {self._num_rows} rows: {before}{now}, {failed} failed{unserved}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if error is not None:
            print(f"{self.summary}; the same command goes on", file=sys.stderr)
