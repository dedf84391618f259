"""An arm: how experts are stored, how many are resident, how many sequences share a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

from benchmarks.common.coded_models import check_encoding

PAGES = "pages"
WAYS = "", "passes", "arriving", PAGES


class ThroughputArm(NamedTuple):
    """One way to generate for all requests."""

    encoding: str
    residency: str
    batch: int
    way: str

    @property
    def name(self) -> str:
        return f"{self.encoding} {self.residency} x{self.batch} {self.way}".rstrip()

    @classmethod
    def parse(cls, name: str) -> ThroughputArm:
        """Parse `ENCODING SHARE xBATCH [passes|arriving|pages]`. Raises ValueError for anything
        else.
        """
        words = name.split()
        if len(words) not in (3, 4) or not words[2].removeprefix("x").isdigit():
            raise ValueError(f"arm {name!r}: give an encoding, a share and xBATCH")
        check_encoding(words[0])
        way = words[3] if len(words) == 4 else ""
        if way not in WAYS:
            raise ValueError(f"arm {name!r}: {way!r} is not one of passes, arriving, pages")
        return cls(words[0], words[1], int(words[2].removeprefix("x")), way)


@contextmanager
def running_as(arm: ThroughputArm) -> Iterator[None]:
    """While active, steps of many rows run in the arm's way."""
    from runtime.cuda.wide.regime import Regime
    from runtime.cuda.wide.wide_rows import WideRows

    if arm.way == "passes":
        with patch.object(WideRows, "fits", lambda *_: False):
            yield
    elif arm.way == "arriving":
        with patch.object(Regime, "expects_all", lambda *_: False):
            yield
    else:
        yield
