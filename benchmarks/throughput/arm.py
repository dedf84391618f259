"""An arm: the system, how experts are stored, what memory it has, how many sequences a step has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.common.coded_models import PLAIN, check_encoding

PAGES, SPILL = "pages", "spill"
WAYS = "", "passes", "arriving", PAGES, SPILL
AUTO = "auto"
"""As many sequences as `runtime.batch` would choose."""
OWN, TRANSFORMERS, ACCELERATE = "expertflow", "transformers", "accelerate"
RIVALS = TRANSFORMERS, ACCELERATE


class ThroughputArm(NamedTuple):
    """One way to generate for all requests."""

    encoding: str
    residency: str
    """Share of the experts' bytes that is resident, or bytes of GPU memory in all."""
    batch: int | None
    """Sequences in flight; None: as many as are chosen for the memory."""
    way: str = ""
    system: str = OWN

    @property
    def name(self) -> str:
        first = self.encoding if self.system == OWN else self.system
        return f"{first} {self.residency} x{self.batch or AUTO} {self.way}".rstrip()

    @classmethod
    def parse(cls, name: str) -> ThroughputArm:
        """Parse `ENCODING|SYSTEM MEMORY xBATCH|xauto [passes|arriving|pages|spill]`.

        Raises ValueError for anything else.
        """
        words = name.split()
        number = words[2].removeprefix("x") if len(words) in (3, 4) else ""
        if number != AUTO and not number.isdigit():
            raise ValueError(
                f"arm {name!r}: give an encoding, a share or a size, and xBATCH or x{AUTO}"
            )
        way = words[3] if len(words) == 4 else ""
        if way not in WAYS:
            raise ValueError(f"arm {name!r}: {way!r} is not one of {', '.join(WAYS[1:])}")
        batch = None if number == AUTO else int(number)
        if words[0] not in RIVALS:
            check_encoding(words[0])
            return cls(words[0], words[1], batch, way)
        if way:
            raise ValueError(f"arm {name!r}: {words[0]} has no ways of its own")
        if words[0] == TRANSFORMERS and (words[1] != "1.0" or batch is None):
            raise ValueError(f"arm {name!r}: {TRANSFORMERS} keeps all resident: 1.0 xBATCH")
        return cls(PLAIN, words[1], batch, way, words[0])


def batch_of(row: dict[str, Any]) -> int:
    """The sequences of a row, which older files have in the arm's name only."""
    return int(row.get("batch") or ThroughputArm.parse(row["arm"]).batch or 0)


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
