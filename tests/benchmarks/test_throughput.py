"""benchmarks.throughput: names of arms, the page, and a rehearsal on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import draw
from benchmarks.common import shapes
from benchmarks.common.report import settings_json
from benchmarks.pages.__main__ import RESULTS, ROOT
from benchmarks.throughput import page, runner
from benchmarks.throughput.__main__ import main
from benchmarks.throughput.arm import ThroughputArm
from benchmarks.throughput.bounds import Machine, Step
from benchmarks.throughput.plot import bounds
from benchmarks.throughput.requests import Load, load_of, traced
from benchmarks.throughput.rivals import largest_batch, run_rival
from benchmarks.throughput.settings import ThroughputSettings
from routing.layers import find_moe_layers
from routing.shards import PROMPT, Document
from routing.topology import Layer, Stack, Topology
from routing.writer import TraceWriter
from runtime.kv.pages import places
from runtime.sizing.row_plan import RowChoice
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
    "steps": 2, "of_link": 0.5, "of_bound": 0.4, "bound": "link", "peak_bytes": 3 << 30,
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


def settings_of(trace: Path | None, **options: Any) -> ThroughputSettings:
    return ThroughputSettings(
        trace=trace, shape="tiny", device="cpu", requests=5, prompt_tokens=[2, 4], tokens=4,
        warm_up=1, chunk=16, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "bf16 0.25 x384", "mxfp4 4GiB x8 passes", "int4 1.0 x1 arriving", "bf16 24GiB xauto",
        "bf16 1.0 x8 pages", "mxfp4 24GiB x512 spill",
        "transformers 1.0 x128", "accelerate 24GiB xauto",
    ],
)  # fmt: skip
def test_an_arm_is_called_what_it_was_parsed_from(name: str) -> None:
    assert ThroughputArm.parse(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bf16 0.25", "give an encoding, a share or a size, and xBATCH"),
        ("bf16 0.25 many", "give an encoding, a share or a size, and xBATCH"),
        ("bf16 0.25 x8 passes too", "give an encoding, a share or a size, and xBATCH"),
        ("transformers 0.5 x8", "transformers keeps all resident"),
        ("transformers 1.0 xauto", "transformers keeps all resident"),
        ("accelerate 4GiB x8 passes", "accelerate has no ways of its own"),
        ("bf8 0.25 x8", "'bf8' is not one of bf16"),
        ("bf16 0.25 x8 slowly", "'slowly' is not one of passes, arriving, pages, spill"),
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
    assert lines[-4] == (
        "| bf16 0.25 x8 | 8 | 25% | 1,234 | 67 | 10.0 | - | 3.00 | 0.50 | 0.40 (link) | 3.0 |"
    )
    assert lines[-3].startswith("| bf16 1.0 x8 (ended by the clock) |")
    assert lines[-1] == "bf16 0.1 x8: no room"


def test_passages_come_again_where_the_trace_has_fewer_than_requests(trace: Path) -> None:
    load = traced(settings_of(trace))
    assert [request.id for request in load.requests] == list("01234") == list(load.recorded)
    first, second, third, _, fifth = (request.prompt for request in load.requests)
    assert first == third == fifth != second


def test_without_a_trace_tokens_are_random_and_routes_as_local_as_asked() -> None:
    options = {"num_hidden_layers": 2, "num_experts": 16, "num_experts_per_tok": 2}
    shape = replace(SMALL, options=SMALL.options | options)
    settings = settings_of(None, locality=0.6)
    load = load_of(settings, shape)
    assert "LRU hits 0.6" in load.routes or "LRU hits 0.5" in load.routes
    for request in load.requests:
        tokens_T, experts_TLK = load.recorded[request.id]
        assert len(tokens_T) == len(request.prompt) + 4 == len(experts_TLK)
        assert request.prompt == tokens_T[: len(request.prompt)].tolist()
        assert (experts_TLK[..., 0] != experts_TLK[..., 1]).all() and experts_TLK.max() < 16
    assert load.recorded["0"].token_ids_T.tolist() != load.recorded["1"].token_ids_T.tolist()


def test_a_rehearsal_serves_every_request(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", SMALL)
    out = trace.parent / "out.json"
    arms = ["bf16 0.5 x3", "mxfp4 2MiB xauto", "bf16 0 x2"]
    main(settings_of(trace, arms=arms, out=out))
    document = json.loads(out.read_text())
    *ran, failed = document["rows"]
    assert "error" in failed
    for row in ran:
        assert row["is_whole"] and row["ended"] == 5 and not row["failed_steps"]
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(20)
        kinds = ("full_step", "mixed_step", "other_step")
        assert sum(row[f"{kind}s"] for kind in kinds) == row["steps"]
    assert [row["batch"] for row in ran] == [3, 5], "as many as there are requests"
    assert len(list(page.throughput(document))) > 6


def test_continuous_batching_serves_the_same_prompts(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", SMALL)
    out = trace.parent / "out.json"
    main(settings_of(trace, arms=["transformers 1.0 x2"], rival_requests=3, out=out))
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["ended"], row["batch"], row["is_whole"]) == (3, 2, True)
    assert row["tokens_per_s"] * row["seconds"] == pytest.approx(3 * 4)


def test_other_systems_are_not_compared_on_requests_of_mixed_lengths() -> None:
    settings, arm = settings_of(None, least_tokens=1), ThroughputArm.parse("transformers 1.0 x2")
    with pytest.raises(ValueError, match="without --least_tokens"):
        run_rival(settings, SMALL, Load([], {}, ""), arm)


def test_the_largest_batch_of_an_offloaded_model_leaves_room_for_two_layers() -> None:
    model, settings = shapes.empty_model(SMALL), settings_of(None, rival_requests=64)
    layers = find_moe_layers(model)
    whole = shapes.weight_bytes(model)

    def found(size: int) -> int:
        arm = ThroughputArm.parse(f"accelerate {size}B xauto")
        return largest_batch(settings, model, layers, arm)

    assert found(2 * whole) > found(whole + (32 << 10)) >= 1
    with pytest.raises(ValueError, match="not one sequence fits"):
        found(whole - 2 * shapes.layer_bytes(layers[0]))
    with pytest.raises(ValueError, match="give the GPU memory in all"):
        largest_batch(settings, model, layers, ThroughputArm.parse("accelerate 0.5 xauto"))


def test_a_batch_on_a_gpu_is_the_one_that_runtime_batch_would_choose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(settings_of(None), device="cuda")
    arm = ThroughputArm.parse("bf16 24GiB xauto")
    source: Any = None
    asked: dict[str, Any] = {}

    def choices(_source: Any, memory: float | int, **options: Any) -> list[RowChoice]:
        asked.update(options, memory=memory)
        return [RowChoice(8, 90, 1.0, 0.1), RowChoice(64, 40, 2.0, 0.1), RowChoice(96, 9, 9.0, 0.1)]

    monkeypatch.setattr(runner, "row_choices", choices)
    assert runner.chosen_size(settings, source, arm, lambda _: 70) == (64, 8, 70, 0)
    assert (asked["memory"], asked["most"], asked["context"]) == (24 << 30, 5, 8)
    assert asked["spill_tokens"] == 0
    monkeypatch.setattr(runner, "row_choices", lambda *_, **__: [])
    with pytest.raises(ValueError, match="no such number of sequences fits"):
        runner.chosen_size(settings, source, arm, lambda _: None)


@pytest.mark.parametrize(("batch", "size"), [("auto", (64, 90, 30)), ("80", (80, 90, 60))])
def test_an_arm_that_spills_has_on_the_gpu_what_fits_there(
    batch: str, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings_of(None), device="cuda")
    choices = [
        RowChoice(32, 9, 1.0, 0.1, 90), RowChoice(64, 9, 1.5, 0.1, 90, 30),
        RowChoice(96, 9, 3.0, 0.1, 90, 60),
    ]  # fmt: skip
    monkeypatch.setattr(runner, "row_choices", lambda *_, **__: choices)
    arm, source = ThroughputArm.parse(f"bf16 24GiB x{batch} spill"), None
    found = runner.chosen_size(settings, source, arm, lambda _: 150)  # type: ignore[arg-type]
    assert (found.batch, found.tokens, found.spilled) == size


def test_spilled_keys_and_values_count_among_what_crossed_the_link() -> None:
    found = {"bytes": 30, "bytes_spilled": 10, "steps": 5, "seconds": 8.0, "tokens_per_s": 1.0}
    step = Step(missing_bytes=8, weight_bytes=1, row_bytes=0, token_flops=0)
    row = runner.bounded(found, 4, step, Machine(10.0, 100.0, None))
    assert row["link_s"] == 4 and row["of_link"] == 0.5
    assert (row["bound"], row["bound_tokens_per_s"]) == ("link", 4.0)


def test_a_step_is_bound_by_what_takes_longest() -> None:
    step = Step(missing_bytes=100, weight_bytes=600, row_bytes=10, token_flops=50)
    assert step.seconds(Machine(10, 100, 1000), batch=40) == {"link": 10, "memory": 10, "FLOPs": 2}
    assert step.seconds(Machine(None, None, None), batch=40) == {}


def test_the_plot_shows_the_bounds_that_the_file_has(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    link = {"expert": 5e10, "64 MiB": 5e10}
    settings = settings_json(settings_of(None))
    step = Step(missing_bytes=1e9, weight_bytes=4e9, row_bytes=1e6, token_flops=1e9)
    rival = {"arm": "transformers 1.0 x8", "batch": 8, "tokens_per_s": 300.0}
    rows = [ROW, ROW | {"arm": "mxfp4 0.25 x8", "step": step._asdict()}, rival]
    result = {"title": "x", "settings": settings, "link_bytes_per_s": link, "rows": rows}
    file.write_text(json.dumps(result))
    draw.main(draw.DrawSettings(results=file, plots=tmp_path / "plots"))
    assert (tmp_path / "plots" / "tiny-throughput.png").stat().st_size > 1000
    machine = Machine(5e10, 4e12, 7e14)
    assert list(bounds(ROW, machine)) == ["link"]
    assert bounds(ROW, machine)["link"][0] == pytest.approx(8 / (3e9 / 5e10))
    assert list(bounds(rows[1], machine)) == ["link", "memory", "FLOPs"]
    file.write_text(json.dumps(result | {"rows": [{"arm": "bf16 0.1 x8", "error": "no room"}]}))
    with pytest.raises(ValueError, match="no arm of the file"):
        draw.main(draw.DrawSettings(results=file, plots=tmp_path))


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


def test_the_readme_has_the_speeds_of_the_files() -> None:
    names = "quarter", "resident"
    files = [RESULTS / f"2026-11-30-throughput-{name}-h200.json" for name in names]
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    speeds = [f"{row['tokens_per_s']:,.0f}" for row in rows if "error" not in row]
    assert " / ".join(speeds) in (ROOT / "README.md").read_text()
