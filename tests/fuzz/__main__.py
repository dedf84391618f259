"""The fuzzers at full size: `python -m tests.fuzz --artefacts 2000 --requests 5000`.

Prints the outcomes and every problem; exits with 1 where there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.fuzz import artefacts, requests
from tests.fuzz.kinds import ARTEFACTS
from tests.helpers.http_server import running
from tests.helpers.serving import offloaded
from tests.helpers.tiny import tiny_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artefacts", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    start = time.monotonic()
    damaged = artefacts.fuzz(ARTEFACTS, chosen.artefacts, chosen.seed)
    for (name, outcome), count in sorted(damaged.outcomes.items()):
        print(f"{name:<12}{outcome:<12}{count:>6}")
    print(f"{chosen.artefacts} artefacts in {time.monotonic() - start:.0f} s", flush=True)
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        offloaded(tiny_model("olmoe"), Path(folder)) as engine,
        running(engine) as address,
    ):
        asked = asyncio.run(requests.fuzz(address, chosen.requests, chosen.seed))
    for status, count in sorted(asked.statuses.items()):
        print(f"status {status}{count:>6}")
    print(
        f"{chosen.requests} requests beside {asked.good} good ones in "
        f"{time.monotonic() - start:.0f} s"
    )
    problems = damaged.problems() | asked.problems()
    for name, found in problems.items():
        print(f"\n{name}: {len(found)}", *found[:20], sep="\n  ")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
