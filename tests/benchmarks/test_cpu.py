"""benchmarks.cpu, rehearsed with small experts: every kind, with threads and without."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.cpu.__main__ import main
from benchmarks.cpu.settings import CpuSettings

KINDS = ["plain", "packed", "int4"]


def test_every_kind_is_timed_beside_torch(capsys: pytest.CaptureFixture[str]) -> None:
    settings = CpuSettings(
        kinds=KINDS, threads=[1, 10_000], hidden=1024, width=1024, experts=4, top_k=2, repeats=1
    )
    main(settings)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["threads"] for row in rows} == {1}
    whats = {kind: {row["what"] for row in rows if row["kind"] == kind} for kind in KINDS}
    assert whats == {
        "plain": {"doorbell", "team", "core", "torch", "reading"},
        "packed": {"doorbell", "team", "core"},
        "int4": {"doorbell", "team", "core"},
    }
    assert all(row["seconds"] > 0 for row in rows)
    assert {row["num_bytes"] for row in rows if row["kind"] == "plain"} == {3 * 2 * 1024 * 1024}
