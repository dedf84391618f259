"""benchmarks.kernels, rehearsed in the interpreter: each kernel as used, and with other tiles."""

from __future__ import annotations

import json
from collections import Counter

import pytest

pytest.importorskip("triton")

from benchmarks.kernels.__main__ import main
from benchmarks.kernels.settings import KernelsSettings


def test_each_kernel_is_timed_as_it_is_used_and_under_other_tiles(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(KernelsSettings(shape="tiny", prompts=[6], batches=[1], device="cpu"))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    kernels = Counter(row["kernel"] for row in rows)
    assert Counter(row["kernel"] for row in rows if row["in_use"]) == dict.fromkeys(kernels, 1)
    for name in ("grouped_gate_up", "grouped_down", "gate_up", "down"):
        assert kernels[name] > 2
        assert len({row["candidate"] for row in rows if row["kernel"] == name}) == kernels[name]
    assert all(row["seconds"] > 0 for row in rows)
    (gate_up,) = (row for row in rows if row["kernel"] == "gate_up" and row["in_use"])
    assert gate_up["num_bytes"] == 8 * 2 * 64 * 32 * 2  # 8 experts, two matrices of 64 x 32, bf16
    assert gate_up["operations"] == 8 * 2 * 64 * 32 * 2
