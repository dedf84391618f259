"""benchmarks.lanes: what of a recorded step is drawn where, and the bound that it sets."""

from __future__ import annotations

import ast
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lanes.bound import Measured, set_bounds
from benchmarks.lanes.kinds import (
    COPIED,
    EXPERTS,
    FETCHED,
    GPU,
    HOST,
    HOST_WORK,
    LINK,
    MODEL,
    OTHER,
    PLAN,
    PREDICTION,
    PREDICTOR,
    PREFETCHED,
    WAITING,
    kind_of,
)
from benchmarks.lanes.lanes import Fetches, Lanes, build_lanes, gpu_rows, read_lanes
from benchmarks.lanes.page import lanes as lanes_table
from benchmarks.lanes.plot import plot_bounds, plot_lanes
from benchmarks.lanes.profile import GpuEvent, Profile, read_profile
from benchmarks.lanes.record import median_step, record_prompt, record_step, steps_of
from benchmarks.lanes.recorder import HostTime, Mark, Recorder
from benchmarks.lanes.spans import Span, apart, by_kind, clipped, joined, without
from benchmarks.systems.arm import Arm
from benchmarks.systems.row import ArmRow
from tests.helpers.gpu_traces import BANDWIDTH, EXPERT_BYTES, decode_trace, prompt_trace

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = 16

times = st.floats(0, 1000, allow_nan=False)
spans = st.lists(st.builds(Span, times, times, st.sampled_from(["a", "b"])), max_size=20)


# ---------------------------------------------------------------------- rows


def covered(row: Sequence[Span], moment: float) -> bool:
    return any(span.start < moment < span.end for span in row)


@given(spans)
def test_a_row_never_overlaps_itself_and_covers_what_its_spans_cover(drawn: list[Span]) -> None:
    row = apart(drawn)
    assert all(one.end <= next_.start + 1e-9 for one, next_ in pairwise(row))
    for span in drawn:
        middle = span.start + span.length / 2
        assert not span.start < middle < span.end or covered(row, middle) or any(
            middle in (one.start, one.end) for one in row
        )  # fmt: skip


@given(spans, spans)
def test_what_is_taken_away_is_gone_and_nothing_else_is(
    drawn: list[Span], others: list[Span]
) -> None:
    left = without(drawn, others)
    for span in left:
        if span.length > 1e-9:  # else its middle is its end, in float64
            assert not covered(others, span.start + span.length / 2)
    total, taken = sum(apart_lengths(left)), sum(apart_lengths(others))
    assert total >= sum(apart_lengths(drawn)) - taken - 1e-6


def apart_lengths(some: Sequence[Span]) -> list[float]:
    return [span.length for span in apart(some)]


def test_spans_are_cut_at_the_ends_of_a_step_and_counted_from_its_start() -> None:
    drawn = [Span(0, 10, "a"), Span(20, 10, "b"), Span(40, 5, "c")]
    assert clipped(drawn, 5, 25) == [Span(0, 5, "a"), Span(15, 5, "b")]


def test_only_small_gaps_between_spans_of_one_kind_are_closed() -> None:
    row = [Span(0, 2, "a"), Span(3, 2, "a"), Span(5, 1, "b"), Span(10, 1, "b")]
    assert joined(row, 1.0) == [Span(0, 5, "a"), Span(5, 1, "b"), Span(10, 1, "b")]
    assert by_kind(row) == {"a": 4, "b": 2}


# ---------------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gate_up", EXPERTS), ("gate_up_of_one", EXPERTS), ("join", EXPERTS),
        ("grouped_down", EXPERTS), ("plan", PLAN), ("pick", PLAN), ("fetch", PREFETCHED),
        ("join_blocks", MODEL), ("nvjet_sm90_tst_64x8_64x16", MODEL),
        ("triton_red_fused_mm_3", MODEL), ("void at::native::reduce_kernel<512, 1>", MODEL),
        ("Memcpy HtoD (Pinned -> Device)", COPIED), ("Memcpy DtoD (Device -> Device)", OTHER),
        ("a_kernel_of_next_year", OTHER), ("Memset (Device)", OTHER),
    ],
)  # fmt: skip
def test_kernels_are_known_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_every_kernel_of_the_project_that_is_launched_has_a_kind() -> None:
    """Names of what `@triton.jit` decorates and a grid launches."""
    root = Path(__file__).resolve().parents[2] / "runtime" / "cuda"
    nodes = [node for path in root.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    kernels = {
        node.name for node in nodes
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }  # fmt: skip
    grids = [ast.unparse(node.value) for node in nodes if isinstance(node, ast.Subscript)]
    launched = kernels & {grid.rpartition(".")[2] for grid in grids}
    assert {"gate_up", "down", "plan", "fetch", "attend_blocks"} <= launched
    assert [name for name in sorted(launched) if kind_of(name) == OTHER] == []


def test_an_unknown_kernel_is_shown_as_other() -> None:
    work = [GpuEvent("nobody_knows_it", 5, 10)]
    assert gpu_rows(work, Fetches()) == ([], [Span(5, 10, OTHER)])


def test_a_kernel_that_fetches_is_split_by_the_bytes_of_its_layer() -> None:
    work = [
        GpuEvent("plan", 0, 5), GpuEvent("gate_up", 5, 100), GpuEvent("gate_up", 105, 20),
        GpuEvent("plan", 130, 5), GpuEvent("gate_up", 135, 300), GpuEvent("gate_up", 435, 40),
    ]  # fmt: skip
    link, gpu = gpu_rows(work, Fetches(270.0, [1, 2]))
    assert link == [Span(5, 90, FETCHED), Span(135, 180, FETCHED)]
    assert by_kind(apart(gpu)) == {PLAN: 10, WAITING: 270, EXPERTS: 190}
    assert Span(95, 10, EXPERTS) in gpu and Span(105, 20, EXPERTS) in gpu


def test_a_kernel_never_waits_for_longer_than_it_lasts() -> None:
    work = [GpuEvent("plan", 0, 5), GpuEvent("gate_up", 5, 100)]
    link, gpu = gpu_rows(work, Fetches(900.0, [3]))
    assert link == [Span(5, 100, FETCHED)]
    assert by_kind(apart(gpu)) == {PLAN: 5, WAITING: 100}


def test_where_layers_are_not_told_apart_the_link_is_shared_by_length() -> None:
    work = [
        GpuEvent("plan", 0, 5), GpuEvent("gate_up", 5, 100),
        GpuEvent("plan", 110, 5), GpuEvent("gate_up", 115, 300),
    ]  # fmt: skip
    link, _ = gpu_rows(work, Fetches(200.0, [1, 1, 1]))
    assert link == [Span(5, 50, FETCHED), Span(115, 150, FETCHED)]


def test_a_head_in_host_memory_is_the_links_and_the_gpu_waits_for_it() -> None:
    link, gpu = gpu_rows([GpuEvent("project", 5, 100)], Fetches())
    assert (link, gpu) == ([Span(5, 100, FETCHED)], [Span(5, 100, WAITING)])


def test_a_step_that_misses_nothing_does_not_wait() -> None:
    work = [GpuEvent("plan", 0, 5), GpuEvent("gate_up", 5, 30)]
    assert gpu_rows(work, Fetches(0.0, [0]))[0] == []


def test_work_on_another_stream_is_no_waiting() -> None:
    work = [GpuEvent("plan", 0, 5), GpuEvent("gate_up", 5, 100), GpuEvent("pick", 20, 10)]
    _, gpu = gpu_rows(work, Fetches(80.0, [1]))
    assert by_kind(apart(gpu)) == {PLAN: 15, WAITING: 70, EXPERTS: 20}


# ---------------------------------------------------------------------- the host


def host_rows(waits: list[Span], noted: list[HostTime], *, on_gpu: bool = True) -> Lanes:
    return build_lanes(
        Profile(waits=waits), noted, 100, 200, fetches=Fetches(), on_gpu=on_gpu
    )  # fmt: skip


def test_the_host_works_where_it_does_not_wait() -> None:
    lanes = host_rows([Span(120, 50, WAITING), Span(190, 40, WAITING)], [])
    assert lanes.rows[HOST] == [Span(0, 20, HOST_WORK), Span(70, 20, HOST_WORK)]


def test_the_predictor_has_a_row_of_its_own() -> None:
    lanes = host_rows([], [HostTime("predict", 90, 30, False), HostTime("step", 95, 80, True)])
    assert lanes.rows[PREDICTOR] == [Span(0, 20, PREDICTION)]
    assert lanes.busy_ms()[HOST] == 0.1


def test_what_else_the_engine_times_is_a_row_of_the_cpu() -> None:
    lanes = host_rows([], [HostTime("experts", 110, 30, False)])
    assert lanes.rows["experts"] == [Span(10, 30, "experts")]


def test_without_a_gpu_loads_are_the_links_and_not_the_hosts() -> None:
    lanes = host_rows([], [HostTime("load", 110, 30, True)], on_gpu=False)
    assert lanes.rows == {
        LINK: [Span(10, 30, COPIED)],
        HOST: [Span(0, 10, HOST_WORK), Span(40, 60, HOST_WORK)],
    }


# ---------------------------------------------------------------------- recorded steps


class CountingStats:
    """Counts as the engine's `Stats` has them."""

    def __init__(self) -> None:
        self.misses_L, self.late_L = np.zeros(LAYERS, np.int64), np.zeros(LAYERS, np.int64)
        self.bytes_loaded = self.bytes_prefetched = 0
        self.noted: list[str] = []

    def add_time(self, name: str, seconds: float) -> None:
        self.noted.append(name)

    def count(self, missed_L: Sequence[int]) -> None:
        self.misses_L = self.misses_L + np.array(missed_L)
        self.bytes_loaded += EXPERT_BYTES * sum(missed_L)


def missed(num_steps: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return random.integers(0, 4, (num_steps, LAYERS)).tolist()


def profiled_by(patch: pytest.MonkeyPatch, trace_of: Callable[[float], dict[str, Any]]) -> None:
    """Let the recorder of a GPU read a trace, made for a start in microseconds of Unix time."""

    @contextmanager
    def profiled(recorder: Any) -> Iterator[None]:
        start = time.time_ns() / 1e3
        yield
        recorder.profile = read_profile(trace_of(start), recorder._origin)

    patch.setattr(Recorder, "_profiled", profiled)


def step_lanes(patch: pytest.MonkeyPatch, **options: Any) -> Lanes:
    """The lanes of one of eight captured steps."""
    missed_SL, stats = missed(8), CountingStats()
    profiled_by(patch, lambda start: decode_trace(start, missed_SL, **options)[0].json())

    def generate(on_token: Callable[[], None]) -> None:
        on_token()
        for missed_L in missed_SL:
            stats.count(missed_L)
            on_token()

    return record_step(generate, stats, CUDA, BANDWIDTH)


@pytest.mark.parametrize("prefetch", [False, True])
def test_rows_of_a_captured_step_do_not_overlap_and_end_with_it(
    monkeypatch: pytest.MonkeyPatch, prefetch: bool
) -> None:
    lanes = step_lanes(monkeypatch, prefetch=prefetch)
    assert list(lanes.rows) == [LINK, HOST, GPU]
    for name, row in lanes.rows.items():
        assert row == apart(row) and row[0].start >= 0 and row[-1].end <= lanes.us + 1e-6
        assert sum(lanes.busy_us[name].values()) <= lanes.us + 1e-6
    assert (PREFETCHED in lanes.busy_us[LINK]) == prefetch


def test_the_links_time_in_a_step_is_that_of_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = step_lanes(monkeypatch)
    needed = [sum(missed_L) * EXPERT_BYTES / BANDWIDTH * 1e6 for missed_L in missed(8)]
    link = lanes.busy_us[LINK]
    assert any(link[FETCHED] == pytest.approx(us, rel=1e-6) for us in needed)
    assert link[COPIED] == pytest.approx(2.0)
    assert lanes.busy_us[GPU][WAITING] == pytest.approx(link[FETCHED])


def test_an_unknown_kernel_in_a_step_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    without_it = step_lanes(monkeypatch).busy_us[GPU][OTHER]
    with_it = step_lanes(monkeypatch, unknown="brand_new").busy_us[GPU][OTHER]
    assert with_it - without_it == pytest.approx(3.0 * LAYERS)


def test_a_step_lasts_until_the_next_one_begins() -> None:
    trace, arrivals = decode_trace(0.0, missed(4))
    profile = read_profile(trace.json(), 0.0)
    nothing = np.zeros(LAYERS, np.int64)
    marks = [Mark(at, nothing, 0) for at in (0.0, 50.0, *arrivals)]
    steps = steps_of(profile, marks)
    starts = [graph for graph in profile.graphs if graph is not None]
    assert [step.start for step in steps] == starts[:3]
    assert [step.end for step in steps] == starts[1:]
    assert [step.after for step in steps] == marks[2:5]
    from_token = steps_of(Profile(), marks)
    assert [(step.start, step.end) for step in from_token] == list(
        zip([50.0, *arrivals], arrivals, strict=False)
    )
    with pytest.raises(ValueError, match="no whole decode step"):
        median_step(steps_of(Profile(), marks[:2]))


def test_a_graph_without_events_counts_as_a_step_all_the_same() -> None:
    trace, _ = decode_trace(0.0, missed(4))
    document = trace.json()
    document["traceEvents"] = [
        event for event in document["traceEvents"]
        if event["args"].get("correlation") not in (20, 21) or "Launch" in event["name"]
    ]  # fmt: skip
    profile = read_profile(document, 0.0)
    assert [graph is None for graph in profile.graphs] == [False, True, False, False]
    marks = [Mark(index, np.full(LAYERS, index), 0) for index in range(6)]
    assert [step.before.at for step in steps_of(profile, marks)] == [3]


def test_a_profile_that_cannot_be_placed_in_time_is_refused() -> None:
    with pytest.raises(ValueError, match="baseTimeNanoseconds"):
        read_profile({"traceEvents": []}, 0.0)


def test_only_waits_of_the_thread_that_launches_are_the_hosts() -> None:
    trace, _ = prompt_trace(0.0, [4] * LAYERS)
    trace.call("cudaStreamSynchronize", 0.0, 9999.0, thread=55)
    waits = read_profile(trace.json(), 0.0).waits
    assert len(waits) == LAYERS + 1  # each layer's routes, and the end
    assert max(span.length for span in waits) < 9999.0


def run_a_while(on_token: Callable[[], None]) -> None:
    """Generate one token, in about the time of a prompt."""
    time.sleep(0.06)
    on_token()


@pytest.mark.parametrize("what", ["kernel", "cuda_runtime"])
def test_a_profile_without_work_or_without_waits_gives_no_lanes(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def trace_of(start: float) -> dict[str, Any]:
        trace = prompt_trace(start, [4] * LAYERS)[0].json()
        kept = [event for event in trace["traceEvents"] if event.get("cat") == what]
        return trace | {"traceEvents": kept}

    profiled_by(monkeypatch, trace_of)
    with pytest.raises(ValueError, match="no GPU work, or no wait"):
        record_prompt(lambda: None, run_a_while, CountingStats(), CUDA)


def test_a_prompts_copies_last_as_long_as_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = CountingStats()
    profiled_by(monkeypatch, lambda start: prompt_trace(start, [4] * LAYERS)[0].json())
    lanes = record_prompt(lambda: None, run_a_while, stats, CUDA)
    copies = 4 * LAYERS * EXPERT_BYTES / BANDWIDTH * 1e6
    assert lanes.busy_us[LINK][COPIED] == pytest.approx(copies, rel=0.01)
    assert lanes.busy_us[GPU][EXPERTS] == pytest.approx(LAYERS * 310, rel=0.01)
    assert 0 < lanes.busy_ms()[HOST] < lanes.us / 1e3


def test_times_of_the_engine_are_noted_by_thread_and_still_counted() -> None:
    stats = CountingStats()
    recorder = Recorder(stats, CPU)
    with recorder.recording():
        stats.add_time("load", 0.001)
        worker = threading.Thread(target=stats.add_time, args=("predict", 0.002))
        worker.start()
        worker.join()
    stats.add_time("load", 1.0)
    assert stats.noted == ["load", "predict", "load"]
    assert [(one.name, one.is_main) for one in recorder.times] == [
        ("load", True), ("predict", False),
    ]  # fmt: skip
    assert recorder.times[1].length == pytest.approx(2000)


def test_lanes_survive_json_in_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = step_lanes(monkeypatch)
    text = json.dumps(lanes.to_json())
    again = read_lanes(json.loads(text))
    assert len(text) < 6000
    assert (again.us, again.busy_us) == (lanes.us, lanes.busy_us)
    for name, row in lanes.rows.items():
        assert [span.kind for span in again.rows[name]] == [span.kind for span in row]
        assert again.rows[name] == apart(again.rows[name])


# ---------------------------------------------------------------------- bounds


def recorded_row(
    residency: str, lanes: Lanes | None, *, policy: str = "lru", compile: bool = False
) -> ArmRow:
    arm = Arm(system="expertflow", residency=residency, policy=policy, compile=compile)
    if lanes is None:
        return ArmRow(arm=arm)
    return ArmRow(arm=arm, recorded_ms=lanes.us / 1e3, busy_ms=lanes.busy_ms())


def bounded(rows: list[ArmRow], ms: dict[str, float], link_ms: float | None = 4.0) -> None:
    set_bounds(
        rows, lambda row: Measured(ms[row.arm.residency], link_ms, row.arm.compile)
    )  # fmt: skip


@pytest.mark.parametrize("prefetch", [False, True])
def test_the_bound_is_never_above_the_time_of_a_consistent_record(
    monkeypatch: pytest.MonkeyPatch, prefetch: bool
) -> None:
    lanes = step_lanes(monkeypatch, prefetch=prefetch)
    row = recorded_row("0.25", lanes)
    bounded([row], {"0.25": lanes.us / 1e3}, lanes.busy_us[LINK][FETCHED] / 1e3)
    assert set(row.least_ms) == {"link", "CPU", "GPU"}
    assert all(0 < least <= lanes.us / 1e3 for least in row.least_ms.values())
    assert row.of_bound is not None and 0 < row.of_bound <= 1


def simple(us: float, **busy_us: float) -> Lanes:
    return Lanes(us=us, rows={}, busy_us={name: {"work": time} for name, time in busy_us.items()})


def test_the_gpus_part_of_a_bound_is_that_of_the_resident_arm_of_its_kind() -> None:
    resident = recorded_row("1.0", simple(3000, link=0, host=300, GPU=2000))
    compiled = recorded_row("1.0", simple(1500, link=0, host=300, GPU=1000), compile=True)
    arm = recorded_row("0.25", simple(8000, link=4000, host=400, GPU=2600))
    faster = recorded_row("0.25", simple(7000, link=4000, host=400, GPU=1900), compile=True)
    bounded([resident, compiled, arm, faster], {"1.0": 3.0, "0.25": 8.0})
    assert arm.least_ms == {"link": 4.0, "CPU": pytest.approx(0.4), "GPU": 2.0}
    assert faster.least_ms["GPU"] == 1.0
    assert arm.of_bound == 0.5
    alone = recorded_row("0.25", simple(8000, link=4000, host=400, GPU=2600))
    bounded([alone], {"0.25": 8.0})
    assert alone.least_ms["GPU"] == 2.6


def test_the_hosts_part_is_its_share_of_the_step_and_the_predictor_is_left_out() -> None:
    busy = {LINK: 100.0, HOST: 5000.0, PREDICTOR: 9000.0, "experts": 6000.0, GPU: 100.0}
    row = recorded_row("0.25", simple(10000, **busy))
    bounded([row], {"0.25": 8.0})
    assert row.least_ms["CPU"] == pytest.approx(0.6 * 8.0)


def test_without_a_link_or_a_recording_there_is_no_bound() -> None:
    row, unrecorded = recorded_row("0.25", simple(10, host=5, GPU=5)), recorded_row("0.5", None)
    bounded([row], {"0.25": 8.0}, None)
    bounded([unrecorded], {"0.5": 8.0})
    assert row.of_bound is None and unrecorded.of_bound is None


def test_the_table_has_a_row_for_every_recorded_arm() -> None:
    arm = recorded_row("0.25", simple(8000, link=4000, host=400, predictor=900, GPU=2600))
    on_cpu = recorded_row("0.5", simple(8000, link=4000, host=400))
    bounded([arm], {"0.25": 8.0})
    document = {"rows": [one.to_json() for one in (arm, on_cpu, recorded_row("0.1", None))]}
    assert list(lanes_table(document)) == [
        "| arm | recorded, ms | link works | host works | predictor works | GPU works | bound, ms"
        " | reached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| expertflow lru 0.25 | 8.00 | 4.00 | 0.40 | 0.90 | 2.60 | 4.00 link | 50% |",
        "| expertflow lru 0.5 | 8.00 | 4.00 | 0.40 | - | - | - | - |",
    ]


def test_pictures_are_drawn_of_any_lanes_and_bounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lanes = step_lanes(monkeypatch, prefetch=True)
    plot_lanes(lanes, "title", {"link": 6.0, "CPU": 0.3, "GPU": 2.0}, tmp_path / "step.png")
    empty = Lanes(us=10, rows={HOST: []}, busy_us={HOST: {}})
    plot_lanes(empty, "title", {}, tmp_path / "empty.png")
    row = recorded_row("0.25", lanes)
    bounded([row], {"0.25": 8.0})
    plot_bounds([("arm", row, 8.0)], "title", tmp_path / "bounds.png")
    assert len(list(tmp_path.glob("*.png"))) == 3
