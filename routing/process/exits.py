"""The ends of a command: exit codes, and one line on stderr in place of a traceback."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141
"""Nobody reads the output any more: what a shell reports for a program that SIGPIPE ended."""


@contextmanager
def friendly_errors(prog: str) -> Iterator[None]:
    """Turn ValueError and OSError into one line on stderr and exit code 2."""
    with quiet_exits(prog):
        try:
            yield
        except ValueError as error:
            _complain(prog, error)


@contextmanager
def quiet_exits(prog: str) -> Iterator[None]:
    """Exit without a traceback after Ctrl-C, an OSError, or where nobody reads the output."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at exit, Python would complain of it in its own way
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(EXIT_UNREAD) from None
        _complain(prog, error)


def _complain(prog: str, error: Exception) -> NoReturn:
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(EXIT_BAD_INPUT) from None


def _nobody_reads() -> bool:
    """Standard output is a pipe whose reader has ended, as `head` does."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
