"""The lock on an output: one writer at a time, and no trace of those that have ended."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from routing.process.output_lock import OutputLock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from routing.process.output_lock import OutputLock

lock = OutputLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def holder_of(out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_writes(out: Path) -> None:
    process = holder_of(out)
    try:
        with pytest.raises(ValueError, match="is being written by") as refused:
            OutputLock(out)
        assert f"process {process.pid} on {socket.gethostname()}" in str(refused.value)
        assert str(out) in str(refused.value)
    finally:
        process.kill()
        process.communicate()  # closes its pipe, too


def test_a_killed_process_frees_its_output(out: Path) -> None:
    process = holder_of(out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # closes its pipe, too
    OutputLock(out).release()


def test_a_process_cannot_take_an_output_twice_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with OutputLock(tmp_path / "real" / "out"), pytest.raises(ValueError, match="being written"):
        OutputLock(tmp_path / "link" / "out")


def test_a_released_lock_leaves_no_file(out: Path) -> None:
    with OutputLock(out):
        assert list(out.parent.iterdir())
    assert list(out.parent.iterdir()) == []
    with OutputLock(out):
        pass


def test_a_file_system_without_locks_is_warned_of(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"), OutputLock(out):
        pass
