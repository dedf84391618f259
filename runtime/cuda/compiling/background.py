"""A process that compiles a step while this one answers with plain steps.

A process and no thread: tracing a model changes what other threads see of it, and would take the
interpreter from the steps that run. It fills files, and touches nothing that lives here.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import IO, NamedTuple

from runtime.cuda.compiling.artefacts import Artefacts

NICENESS = 10
"""The compiler gives way to whatever answers."""
LAST_LINES = 3


class Task(NamedTuple):
    """What the process is to compile."""

    blueprint: bytes
    artefacts: Artefacts


class CompilerProcess:
    """A process that has begun with `task`."""

    def __init__(self, task: Task) -> None:
        self.artefacts = task.artefacts
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        paths = [os.path.abspath(path) for path in sys.path]
        with tempfile.TemporaryFile() as file:
            pickle.dump(task, file)
            file.flush()
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "runtime.cuda.compiling", str(file.fileno())],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, pass_fds=[file.fileno()],
            )  # fmt: skip

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def failure(self) -> str | None:
        """Why an ended process compiled nothing; None: it did."""
        if self._process.returncode == 0:
            return None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = " ".join(line.strip() for line in lines[-LAST_LINES:])
        return said or f"its process ended with {self._process.returncode}"

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._errors.close()
