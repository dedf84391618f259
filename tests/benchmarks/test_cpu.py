"""benchmarks.cpu, rehearsed with small experts: every kind, with threads and without."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.cpu import decode
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


def test_a_whole_model_decodes_beside_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    settings = decode.CpuDecodeSettings(
        shape="tiny", layers=2, encodings=["bf16", "int4"], threads=[1], prompt=4, tokens=3,
        repeats=1,
    )  # fmt: skip
    decode.main(settings)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["system"], row["encoding"]) for row in rows] == [
        (system, encoding)
        for encoding in ("bf16", "int4")
        for system in (*decode.STOCK, "expertflow")
    ]
    assert all(row["logits"].endswith(("identical", "argmax 100%")) for row in rows)
    attention, router, norms, head = 4 * 64 * 64, 64 * 64, 4 * 64, 64 * 12288 + 64
    used = 2 * (attention + router + norms + 8 * 3 * 32 * 64) + head
    assert {row["num_bytes"] for row in rows} == {2 * used}


def test_more_layers_than_the_shape_has_are_refused() -> None:
    with pytest.raises(ValueError, match="layers=17: tiny has 1 to 16"):
        decode.main(decode.CpuDecodeSettings(shape="tiny", layers=17))
