"""benchmarks.kernels, rehearsed in the interpreter: each kernel as used, and with other tiles."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

pytest.importorskip("triton")

from benchmarks.common import shapes
from benchmarks.kernels import attention, candidates
from benchmarks.kernels.__main__ import main
from benchmarks.kernels.settings import KernelsSettings


@pytest.fixture(autouse=True)
def few_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny shape: kernels are interpreted."""
    few = {"num_experts": 4, "num_experts_per_tok": 2}
    tiny = dataclasses.replace(shapes.TINY, options=shapes.TINY.options | few)
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)


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
    assert gate_up["num_bytes"] == 2 * 2 * 64 * 32 * 2  # 2 experts, two matrices of 64 x 32, bf16
    assert gate_up["operations"] == 2 * 2 * 64 * 32 * 2


def test_kernels_of_experts_in_codes_are_checked_before_they_are_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "CODED", {key: [] for key in candidates.CODED})
    main(KernelsSettings(shape="tiny", encodings=["mxfp4"], prompts=[], batches=[1], device="cpu"))
    out = capsys.readouterr().out.splitlines()
    assert "tiny mxfp4: right at batches [1]" in out
    rows = json.loads(out[-1])["rows"]
    assert [(row["encoding"], row["kernel"]) for row in rows] == [
        ("mxfp4", "gate_up"), ("mxfp4", "down"), ("mxfp4", "plan"),
    ]  # fmt: skip


def test_an_unknown_encoding_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="encodings='mxfp3' is not one of mxfp4"):
        main(KernelsSettings(shape="tiny", encodings=["mxfp3"], device="cpu"))


def test_attention_is_timed_beside_torchs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CANDIDATES", [(64, 4), (32, 2)])
    settings = {"contexts": [40, 70], "batches": [1, 2], "device": "cpu", "repeats": 1}
    main(KernelsSettings(shape="tiny-gpt-oss", **settings))  # type: ignore[arg-type]
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["kernel"], row["tokens"], row["candidate"], row["in_use"]) for row in rows] == [
        (f"attend {context}", batch, candidate, candidate == "64 keys, 4 warps")
        for context in (40, 70) for batch in (1, 2)
        for candidate in ("64 keys, 4 warps", "32 keys, 2 warps", "torch")
    ]  # fmt: skip
    assert rows[0]["num_bytes"] == 2 * 2 * 40 * 32 * 2  # keys and values of 2 heads, bf16
    assert all(row["seconds"] > 0 for row in rows)
