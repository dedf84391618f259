"""Results that survive a kill: appended as they come, put in order at the end.

While a batch runs, `OUT.partial` holds one JSON line a result, in the order of their ends, below a
line that says what the batch is. Once all are there they are written to OUT by index, at once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Journal:
    """The results of one batch. `done`: the indices that are there already."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        """Start or resume. Raises ValueError where `out` exists or is of another batch."""
        if out.exists():
            raise ValueError(f"{out} exists already: choose another file, or delete it")
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} to write {out.name} to")
        self._out = out
        self.path = out.with_name(out.name + ".partial")
        self.done: set[int] = set()
        self._file = self.path.open("a+b")
        try:
            self._resume(identity)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        self._file.truncate(self._file.tell() - len(lines.pop()))  # a line that was cut off
        if len(lines) < 2:  # nothing but what the batch is, which may have been a mistake
            self._file.truncate(0)
            self._append(identity)
            return
        if json.loads(lines[0]) != identity:
            raise ValueError(
                f"{self.path} is of another batch (model, data set or settings differ): choose "
                "another --out, or delete it"
            )
        self.done = {json.loads(line)["index"] for line in lines[1:]}

    def add(self, index: int, result: dict[str, Any]) -> None:
        """Keep one result."""
        assert index not in self.done
        self._append({"index": index} | result)
        self.done.add(index)

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def finish(self) -> None:
        """Write OUT, one line an input in their order, and drop the partial file."""
        self._file.close()
        with self.path.open("rb") as partial:
            partial.readline()
            lines = sorted(partial, key=lambda line: json.loads(line)["index"])
        unfinished = self._out.with_name(self._out.name + ".tmp")
        with unfinished.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._out)
        self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
