"""A small dose of the request fuzzer; `python -m tests.fuzz` gives the large one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.fuzz.requests import fuzz
from tests.helpers.http_server import running
from tests.helpers.serving import offloaded
from tests.helpers.tiny import tiny_model


def test_no_request_ends_hangs_or_harms_another(tmp_path: Path) -> None:
    with (
        offloaded(tiny_model("olmoe"), tmp_path) as engine,
        running(engine) as address,
    ):
        findings = asyncio.run(fuzz(address, 150))
    assert not findings.problems()
    assert findings.good == 38 and sum(findings.statuses.values()) == 150
