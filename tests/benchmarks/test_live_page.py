"""The benchmark of the open page: its clocks, its sums, its table."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from benchmarks.live_page import viewers
from benchmarks.live_page.page import live_page
from benchmarks.live_page.processes import below, browser_seconds, kind_of, process_seconds
from benchmarks.live_page.run import Moment, measured
from benchmarks.live_page.settings import LivePageSettings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
BUSY = "import time\nuntil = time.process_time() + 0.3\nwhile time.process_time() < until: pass\n"


def given(**fields: Any) -> LivePageSettings:
    return LivePageSettings(model="m", predictor="p", **fields)  # type: ignore[arg-type]


def row(viewer: str, speed: float, **browser: float) -> dict[str, Any]:
    http = {"nobody": 0.02}.get(viewer, 0.025)
    return {
        "viewer": viewer, "tokens_per_second": speed, "server": 0.5, "http": http,
        "browser": browser,
    }  # fmt: skip


def test_the_time_of_processes_below_counts_by_kind() -> None:
    words = [sys.executable, "-c", BUSY + "time.sleep(20)", "--type=renderer"]
    with subprocess.Popen(words) as process:
        try:
            until = time.monotonic() + 10
            while process_seconds(process.pid) < 0.3 and time.monotonic() < until:
                time.sleep(0.05)
            assert process.pid in set(below(os.getpid()))
            assert kind_of(process.pid) == "renderer"
            assert browser_seconds(process.pid)["renderer"] >= 0.3
        finally:
            process.kill()


def test_what_passed_between_two_moments_is_told_by_the_second() -> None:
    first = Moment(10, 1.0, 5.0, 0.5, {"browser": 1.0})
    last = Moment(110, 3.0, 8.0, 0.6, {"browser": 1.1, "renderer": 0.4})
    found = measured("page", first, last)
    assert found["tokens_per_second"] == 50
    assert found["server"] == 1.5
    assert found["browser"] == pytest.approx({"browser": 0.05, "renderer": 0.2})


def test_the_table_pairs_each_viewer_with_nobody_of_the_same_turn() -> None:
    rows = [row("nobody", 40), row("page", 44, renderer=0.02), row("nobody", 20)]
    rows += [row("page", 20, renderer=0.03), row("nobody", 50), row("page", 49, renderer=0.02)]
    document = {
        "machine": {"cpu": "x"}, "command": "c", "link_bytes_per_s": None, "cores": 2, "rows": rows,
    }  # fmt: skip
    page = list(live_page(document))[-1].split(" | ")
    assert page[1:4] == ["44.0", "20.0 to 49.0", "+0.0%"]
    assert page[4:] == ["88.0", "20.0", "25.0", "25.0", "1.2% |"]


def test_a_viewer_that_is_not_known_or_lacks_its_program_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="someone"):
        given(viewers=["someone"])
    viewers.check(given(viewers=["nobody", "stream"], chromium="none"))
    with pytest.raises(ValueError, match="no none"):
        viewers.check(given(chromium="none"))
    monkeypatch.setattr(viewers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="playwright"):
        viewers.check(given())
