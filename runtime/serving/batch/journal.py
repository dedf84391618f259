"""Results that survive a kill: appended as they come, put in order at the end.

While a batch runs, `OUT.partial` holds one JSON line a result, in the order of their ends, below a
line that says what the batch is. Once all are there their lines are written to OUT by index, at
once. `OUT.partial` stays beside OUT where rows failed, so that they can be served again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from routing.process.output_lock import OutputLock


class Journal:
    """The results of one batch, which no other process can write meanwhile.

    done: indices of rows that have their result. failed: of rows whose result is an error.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, retry_failed: bool = False) -> None:
        """Start or resume.

        Raises ValueError where `out` exists, is of another batch or is being written. retry_failed:
        an `out` that exists is written again, once its failed rows have been served.
        """
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} to write {out.name} to")
        self._out = out
        self.path = out.with_name(out.name + ".partial")
        self.done: set[int] = set()
        self.failed: set[int] = set()
        self._places: dict[int, int] = {}
        self._lock = OutputLock(out)
        try:
            self._check_out(retry_failed)
            self._file = self.path.open("a+b")
        except BaseException:
            self._lock.release()
            raise
        try:
            self._resume(identity)
        except BaseException:
            self.close()
            raise

    def _check_out(self, retry_failed: bool) -> None:
        has_failed = self.path.exists()
        if self._out.exists() and not retry_failed:
            hint = ", or serve its failed rows again with --retry-failed" if has_failed else ""
            raise ValueError(f"{self._out} exists already: choose another file, or delete it{hint}")
        if retry_failed and self._out.exists() and not has_failed:
            raise ValueError(f"{self._out} has no failed rows: there is no {self.path}")

    def _resume(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        header = self._file.readline()
        place = self._file.tell()
        lines = iter(self._file.readline, b"")
        for number, line in enumerate(lines, 2):
            if not line.endswith(b"\n"):  # it was cut off
                break
            if place == len(header) and json.loads(header) != identity:
                raise ValueError(
                    f"{self.path} is of another batch (model, data set or settings differ): "
                    "choose another --out, or delete it"
                )
            self._recall(line, number, place)
            place += len(line)
        self._file.truncate(place)
        if not self._places:  # nothing but what the batch is, which may have been a mistake
            self._file.truncate(0)
            self._append(identity)

    def _recall(self, line: bytes, number: int, place: int) -> None:
        try:
            record = json.loads(line)
            self._note(int(record["index"]), bool(record["failed"]), place)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"line {number} of {self.path} is damaged: delete that line, and its row is served "
                "again"
            ) from error

    def _note(self, index: int, failed: bool, place: int) -> None:
        self._places[index] = place
        (self.failed if failed else self.done).add(index)
        (self.done if failed else self.failed).discard(index)

    def add(self, index: int, line: dict[str, Any], *, failed: bool = False) -> None:
        """Keep the line of one row, in place of an error that it had before."""
        assert index not in self.done
        place = self._append({"index": index, "failed": failed, "line": line})
        self._note(index, failed, place)

    def _append(self, record: dict[str, Any]) -> int:
        """Write a line. Returns where it begins."""
        place = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(_encoded(record) + b"\n")
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written ({error.strerror}): the {len(self.done)} results "
                "in it are kept; run the same command again when it can"
            ) from error
        return place

    def finish(self) -> None:
        """Write OUT, one line a row and in their order; drop the partial file if none failed."""
        unfinished = self._out.with_name(self._out.name + ".tmp")
        try:
            with unfinished.open("wb") as file:
                for index in sorted(self._places):
                    self._file.seek(self._places[index])
                    file.write(_encoded(json.loads(self._file.readline())["line"]) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._out)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise ValueError(
                f"{self._out} cannot be written ({error.strerror}): all results are in "
                f"{self.path}; run the same command again when it can"
            ) from error
        self._file.close()
        if not self.failed:
            self.path.unlink()

    def close(self) -> None:
        """Close the file and let others write."""
        try:
            self._file.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _encoded(record: dict[str, Any]) -> bytes:
    """JSON in UTF-8, or in ASCII where a text holds what UTF-8 cannot."""
    try:
        return json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return json.dumps(record, default=str).encode()
