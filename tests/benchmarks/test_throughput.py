"""benchmarks.throughput: names of arms, the page, and a rehearsal on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common import shapes
from benchmarks.pages.__main__ import RESULTS, ROOT
from benchmarks.throughput import page, runner
from benchmarks.throughput.__main__ import main
from benchmarks.throughput.arm import ThroughputArm
from benchmarks.throughput.runner import drawn
from benchmarks.throughput.settings import ThroughputSettings
from routing.shards import PROMPT, Document
from routing.topology import Layer, Stack, Topology
from routing.writer import TraceWriter
from runtime.kv.pages import places
from tests.routing.test_shards import PROVENANCE

SMALL = replace(
    shapes.TINY,
    options=shapes.TINY.options | {
        "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 256,
    },
)  # fmt: skip
ROW = {
    "arm": "bf16 0.25 x8", "is_whole": True, "slots": 1, "experts": 4, "tokens_per_s": 1234.5,
    "prompt_tokens_per_s": 67.0, "full_step_ms": 10.04, "mixed_step_ms": None, "bytes": 6e9,
    "steps": 2, "of_link": 0.5, "peak_bytes": 3 << 30,
}  # fmt: skip
LINES = {"command": "python -m x", "machine": {"cpu": "y", "cores": 2}}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two passages of eight tokens."""
    layers = tuple(Layer(f"model.layers.{i}.mlp.experts", 4, 2) for i in range(2))
    stack = Stack(name="decoder", layers=layers)
    topology = Topology(
        model_type="olmoe", vocab_size=256, stacks=(stack,), model="0" * 16, tokenizer="1" * 16
    )
    random, phase_T = np.random.default_rng(0), np.full(8, PROMPT, np.uint8)
    with TraceWriter(tmp_path / "trace", topology, provenance=PROVENANCE) as writer:
        for _ in range(2):
            experts_TLK = np.argsort(random.random((8, 2, 4)))[..., :2].astype(np.uint8)
            tokens_T = random.integers(2, 256, 8).astype(np.int32)
            writer.add({"decoder": Document(tokens_T, experts_TLK, phase_T, "text")})
    return tmp_path / "trace"


def settings_of(trace: Path, **options: Any) -> ThroughputSettings:
    return ThroughputSettings(
        trace=trace, shape="tiny", device="cpu", requests=5, prompt_tokens=[2, 4], tokens=4,
        warm_up=1, chunk=16, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["bf16 0.25 x384", "mxfp4 4GiB x8 passes", "int4 1.0 x1 arriving", "bf16 1.0 x8 pages"]
)
def test_an_arm_is_called_what_it_was_parsed_from(name: str) -> None:
    assert ThroughputArm.parse(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bf16 0.25", "give an encoding, a share and xBATCH"),
        ("bf16 0.25 many", "give an encoding, a share and xBATCH"),
        ("bf16 0.25 x8 passes too", "give an encoding, a share and xBATCH"),
        ("bf8 0.25 x8", "'bf8' is not one of bf16"),
        ("bf16 0.25 x8 slowly", "'slowly' is not one of passes, arriving, pages"),
    ],
)
def test_a_name_that_is_no_arm_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThroughputArm.parse(name)


def test_the_page_has_the_machine_the_arms_and_what_failed() -> None:
    ended = ROW | {"arm": "bf16 1.0 x8", "is_whole": False, "of_link": None, "peak_bytes": None}
    rows = [ROW, ended, {"arm": "bf16 0.1 x8", "error": "no room"}]
    document = LINES | {"link_bytes_per_s": {"expert": 5e10, "64 MiB": 5.5e10}, "rows": rows}
    lines = list(page.throughput(document))
    assert lines[:3] == ["    python -m x", "", "cpu y, cores 2; link 55.0 GB/s."]
    assert lines[-4] == ("| bf16 0.25 x8 | 25% | 1,234 | 67 | 10.0 | - | 3.00 | 0.50 | 3.0 |")
    assert lines[-3].startswith("| bf16 1.0 x8 (ended by the clock) |")
    assert lines[-1] == "bf16 0.1 x8: no room"


def test_passages_come_again_where_the_trace_has_fewer_than_requests(trace: Path) -> None:
    requests, recorded = drawn(settings_of(trace))
    assert [request.id for request in requests] == list("01234") == list(recorded)
    assert requests[0].prompt == requests[2].prompt == requests[4].prompt
    assert requests[0].prompt != requests[1].prompt


def test_a_rehearsal_serves_every_request(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", SMALL)
    out = trace.parent / "out.json"
    main(settings_of(trace, arms=["bf16 0.5 x3", "mxfp4 1.0 x2", "bf16 0 x2"], out=out))
    document = json.loads(out.read_text())
    *ran, failed = document["rows"]
    assert "error" in failed
    for row in ran:
        assert row["is_whole"] and row["ended"] == 5 and not row["failed_steps"]
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(20)
        kinds = ("full_step", "mixed_step", "other_step")
        assert sum(row[f"{kind}s"] for kind in kinds) == row["steps"]
    assert len(list(page.throughput(document))) > 6


def test_pages_are_reserved_for_the_requests_mean_length(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that are parked for others go on with their own routes."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", SMALL)
    monkeypatch.setattr(runner, "PAGE", 1)
    monkeypatch.setattr(places, "PAGE", 1)
    out = trace.parent / "out.json"
    arms = ["bf16 0.5 x3", "bf16 0.5 x3 pages"]
    main(settings_of(trace, arms=arms, out=out, least_tokens=1))
    whole, paged = json.loads(out.read_text())["rows"]
    assert whole["ended"] == paged["ended"] == 5
    assert not (whole["failed_steps"] or paged["failed_steps"])
    assert paged["key_value_bytes"] < whole["key_value_bytes"]


def test_the_readme_has_the_speeds_of_the_file() -> None:
    rows = json.loads((RESULTS / "2026-11-30-throughput-h200.json").read_text())["rows"]
    speeds = [f"{row['tokens_per_s']:,.0f}" for row in rows if "error" not in row]
    assert " / ".join(speeds) in (ROOT / "README.md").read_text()
