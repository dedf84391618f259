"""benchmarks.decode and .prefill: rows, their figures, and the whole programs, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import draw
from benchmarks.common.link import best, link_efficiency, measure_link
from benchmarks.common.shapes import TINY, build_model, shape_named, weight_bytes
from benchmarks.decode import __main__ as decode
from benchmarks.decode.arms import decode_arms
from benchmarks.decode.plot import plot_bytes, plot_speed
from benchmarks.decode.ranges import RangesSettings
from benchmarks.decode.ranges import main as compare_ranges
from benchmarks.decode.report import ratios
from benchmarks.decode.settings import DecodeSettings
from benchmarks.prefill import __main__ as prefill
from benchmarks.prefill.row import PrefillRow
from benchmarks.prefill.settings import PrefillSettings
from benchmarks.replay.text_replay import CHOSEN_LOGIT
from benchmarks.systems.arm import Arm
from benchmarks.systems.counts import Counts, read_counts
from benchmarks.systems.logits import compare_logits
from benchmarks.systems.placement import place, restored
from benchmarks.systems.row import Row
from benchmarks.systems.running import Running, offloaded, run_arm
from benchmarks.systems.subject import Subject
from routing.cli import run
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")


def row(policy: str, residency: str, share: float, **values: Any) -> Row:
    arm = Arm(system="expertflow", policy=policy, residency=residency)
    return Row(arm=arm, extra={"resident_share": share}, **values)


def test_link_efficiency_is_the_part_of_the_time_that_the_link_needs() -> None:
    assert link_efficiency(needed_bytes=25e9 * 0.008, seconds=0.01, bandwidth=25e9) == (
        pytest.approx(0.8)
    )
    assert link_efficiency(1e9, 0.01, None) is None
    assert link_efficiency(1e9, 0.0, 25e9) is None


def test_the_better_of_the_measured_bandwidths_counts_and_a_cpu_has_no_link() -> None:
    assert best({"expert": 54e9, "64 MiB": 55e9}) == 55e9
    assert best(measure_link(1 << 20, CPU)) is None


def test_counts_of_a_part_are_differences() -> None:
    stats = SimpleNamespace(
        hits=10, late_L=np.array([1, 0]), misses=3,
        bytes_loaded=490, bytes_prefetched=90, bytes_wasted=60,
    )  # fmt: skip
    part = read_counts(stats).minus(Counts(7, 1, 100, 0, 0))
    assert part == Counts(3, 3, 300, 90, 60)
    assert (part.bytes_moved, part.bytes_needed) == (390, 330)
    assert Counts(1, 2, 3, 4, 5).plus(Counts(1, 1, 1, 1, 1)) == Counts(2, 3, 4, 5, 6)


def test_logits_are_compared_bit_by_bit_and_then_by_size() -> None:
    reference = torch.tensor([[1.0, 4.0], [2.0, 0.0]])
    assert compare_logits(reference.clone(), reference) == "identical"
    other = torch.tensor([[1.0, 4.0], [2.0, 3.0]])
    assert compare_logits(other, reference) == "7.5e-01, argmax 50%"
    reference[0, 0] = other[0, 0] = CHOSEN_LOGIT
    assert compare_logits(other, reference) == "7.5e-01, argmax 50%"


def test_a_failing_arm_costs_its_row_only_and_the_model_is_itself_again() -> None:
    model, arm = tiny_model("olmoe"), Arm(system="transformers")
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}

    @contextmanager
    def set_up() -> Iterator[Running]:
        place(model, torch.device("meta"), experts=True)
        model.get_submodule("model.norm").forward = lambda hidden: hidden
        yield Running({})

    def measure(running: Running, row: Row) -> None:
        raise RuntimeError("out of\n memory")

    failed = run_arm(arm, model, set_up, measure)
    assert failed.error == "RuntimeError: out of memory"
    for name, parameter in model.named_parameters():
        assert (parameter, parameter.data_ptr()) == before[name]
    assert "forward" not in model.get_submodule("model.norm").__dict__


def test_expertflow_gives_the_experts_back_itself() -> None:
    model = tiny_model("olmoe")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arm = Arm(system="expertflow", residency="0.5", policy="lru")
    run_arm(arm, model, lambda: offloaded(model, memory=0.5, device="cpu"), lambda *_: None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    with restored(model, experts=False):
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
    kept = {name for name, parameter in model.named_parameters() if parameter.numel()}
    assert kept == {name for name in before if ".experts." not in name}


def test_experts_stay_on_the_host_if_asked_to() -> None:
    model = tiny_model("olmoe")
    with restored(model):
        place(model, torch.device("meta"), experts=False)
        devices = {name: p.device.type for name, p in model.named_parameters()}
    assert {d for name, d in devices.items() if ".experts." in name} == {"cpu"}
    assert {d for name, d in devices.items() if ".experts." not in name} == {"meta"}


def test_a_built_model_is_random_in_its_matrices_and_runs() -> None:
    model = build_model(TINY, CPU)
    assert model.dtype == torch.bfloat16
    experts = model.model.layers[3].mlp.experts.gate_up_proj
    assert 0.015 < float(experts.float().std()) < 0.025
    assert not torch.equal(experts, model.model.layers[4].mlp.experts.gate_up_proj)
    assert torch.all(model.model.norm.weight == 1)
    assert weight_bytes(model) == sum(p.numel() * 2 for p in model.parameters())
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_an_unknown_shape_or_system_is_named() -> None:
    with pytest.raises(ValueError, match="'gpt-9' is not one of olmoe-7b"):
        shape_named("gpt-9")
    with pytest.raises(ValueError, match="'vllm' is not one of float32, transformers"):
        decode_arms(DecodeSettings(systems=["vllm"]))


def test_arms_are_distinct_and_cover_every_policy_at_every_residency() -> None:
    arms = decode_arms(DecodeSettings(trace=Path("trace"), predictor=Path("p.onnx")))
    assert len({arm.name for arm in arms}) == len(arms)
    plain = {
        (arm.policy, arm.residency)
        for arm in arms
        if arm.system == "expertflow" and arm.batch == 1 and not arm.prefetch and not arm.compile
    }
    shares = ("0.25", "0.5", "0.125")
    assert plain >= {(p, r) for p in ("predicted", "lru", "lfu", "belady") for r in shares}
    assert {("lru", "1.0"), ("none", "min")} <= plain


def test_a_policy_without_its_predictor_or_trace_gets_one_row_and_leads_nothing() -> None:
    arms = decode_arms(DecodeSettings())
    assert len([arm for arm in arms if arm.policy in ("predicted", "belady")]) == 2
    assert {arm.policy for arm in arms if arm.batch > 1} == {"lru"}
    with pytest.raises(ValueError, match="each of them needs"):
        decode_arms(DecodeSettings(policies=["predicted"]))


def test_every_number_of_ranges_has_a_row_of_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    small: dict[str, Any] = {"shape": "tiny", "device": "cpu", "tokens": 2, "prompt": 4}
    compare_ranges(RangesSettings(batches=[2], counts=[1, 4], **small))
    printed = capsys.readouterr().out
    assert printed.count("expertflow reuse 0.25 x2") == 2
    assert "in 1 ranges:" in printed and "in 4 ranges:" in printed


def test_batches_are_measured_with_the_first_policy_and_with_lru() -> None:
    arms = decode_arms(DecodeSettings(policies=["reuse", "lfu", "lru"], batches=[8, 32]))
    wide = [(a.policy, a.batch) for a in arms if a.batch > 1 and a.residency == "0.25"]
    assert wide == [("reuse", 8), ("lru", 8), ("reuse", 32), ("lru", 32)]


def test_ratios_are_over_every_other_system_and_over_batch_1() -> None:
    offloading = Arm(system="expertflow", policy="lru", residency="0.25")
    rows = [
        Row(arm=offloading, tokens_per_s=100.0),
        Row(arm=replace(offloading, batch=8), tokens_per_s=350.0),
        Row(arm=replace(offloading, prefetch=True), tokens_per_s=90.0),
        Row(arm=replace(offloading, compile=True), tokens_per_s=120.0),
        Row(arm=Arm(system="accelerate", residency="0.0"), tokens_per_s=0.5),
        Row(arm=Arm(system="compiled"), error="failed"),
    ]
    expected = {"over accelerate 0.0": 200.0, "batch 8 over batch 1": 3.5}
    assert ratios(rows, "lru", "0.25") == expected
    assert ratios(rows, "lru", "0.5") == {}


def test_residencies_become_memory_for_the_runtime() -> None:
    subject = Subject("tiny", CPU, trace=None, predictor=None, seed=0)
    assert subject.memory("min") == 8 / (16 * 64)
    assert subject.memory("6.28%") == int(0.0628 * weight_bytes(subject.model))
    assert subject.memory("2GiB") == "2GiB"
    assert not subject.replays


def test_plots_are_drawn_from_few_rows_and_from_none(tmp_path: Path) -> None:
    rows = [
        row("lru", "0.25", 0.25, tokens_per_s=50.0, floor_ms=18.0, bytes_per_token=1e9),
        row("none", "min", 0.008, tokens_per_s=30.0, floor_ms=29.0, bytes_per_token=1.6e9),
        Row(arm=Arm(system="accelerate"), tokens_per_s=0.6),
        Row(arm=Arm(system="compiled"), error="OutOfMemoryError: no"),
    ]
    for index, chosen in enumerate((rows, [])):
        plot_speed(chosen, "title", tmp_path / f"speed{index}.png")
        plot_bytes(chosen, "title", tmp_path / f"bytes{index}.png")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_bounds_are_drawn_where_they_are_known_and_older_files_as_far_as_they_go(
    tmp_path: Path,
) -> None:
    known: dict[str, Any] = {"least_ms": {"link": 4.0, "CPU": 0.3, "GPU": 2.0}, "of_bound": 0.5}
    step = row("lru", "0.25", 0.25, tokens_per_s=125.0, step_ms=8.0, **known)
    prompt = PrefillRow(arm=step.arm, prompt=8, milliseconds=8.0, **known)
    for one, settings in ((step, {"shape": "a"}), (prompt, {"shape": "a", "prompts": [8]})):
        values = one.to_json()
        result = {"title": "title", "settings": settings, "rows": [values]}
        (tmp_path / "new.json").write_text(json.dumps(result | {"lanes": {}}))
        old = {
            name: value
            for name, value in values.items()
            if name not in ("not_recorded", "cpu_share", *known)
        }
        (tmp_path / "old.json").write_text(json.dumps(result | {"rows": [old], "timelines": {}}))
        for name in ("new", "old"):
            file = tmp_path / f"{name}.json"
            draw.main(draw.DrawSettings(results=file, plots=tmp_path / name))
    old_plots = {"a-speed.png", "a-bytes.png", "a-prefill.png"}
    assert {path.name for path in (tmp_path / "old").iterdir()} == old_plots
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "a-bounds.png", "a-prefill-bounds.png", *old_plots,
    }  # fmt: skip


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_decode_prints_a_row_for_every_arm_and_json_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plots = tmp_path / "new" / "out.json", tmp_path / "plots"
    argv = (
        "--shape tiny --device cpu --residency 1.0 0.25 --policies lru predicted --batches 2 "
        f"--prompt 4 --tokens 5 --documents 1 --check_steps 3 --out {out} --plots {plots}"
    )
    run(decode.main, DecodeSettings, argv.split(), prog="decode")
    result = last_line(capsys)
    assert json.loads(out.read_text()) == result
    assert {"gpu", "machine", "command", "model", "settings"} - result.keys() == {"gpu"}
    rows = {row["name"]: row for row in result["rows"]}
    offloading = rows["expertflow lru 0.25"]
    assert (offloading["error"], offloading["steps"], offloading["slots"]) == (None, 4, 256)
    assert offloading["bytes_per_token"] > 0 and 0 <= offloading["hit_rate"] < 1
    assert offloading["logits"]["expertflow"] == "identical"
    assert float(offloading["logits"]["float32"].partition(",")[0]) < 0.05
    assert rows["transformers grouped_mm 1.0"]["tokens_per_s"] > 0
    assert rows["expertflow predicted 0.25"]["error"] == "ValueError: predicted needs a predictor"
    assert rows["accelerate 0.0"]["error"] == "ValueError: accelerate needs a CUDA device"
    assert {arm for arm in rows if rows[arm]["recorded_ms"]} == result["lanes"].keys()
    assert result["lanes"].keys() == {arm for arm in rows if arm.startswith("expertflow lru")}
    lanes = result["lanes"]["expertflow lru 0.25"]
    assert list(lanes["rows"]) == ["link", "host"]
    assert offloading["busy_ms"]["link"] > 0 and offloading["busy_ms"]["host"] > 0
    assert sum(offloading["busy_ms"].values()) == pytest.approx(offloading["recorded_ms"])
    assert {path.name for path in plots.iterdir()} == {
        "tiny-speed.png", "tiny-bytes.png",
        *(f"tiny-lanes-{arm.replace(' ', '-')}.png" for arm in result["lanes"]),
    }  # fmt: skip
    again = tmp_path / "again"
    run(draw.main, draw.DrawSettings, ["--results", str(out), "--plots", str(again)], prog="draw")
    for path in plots.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_a_file_of_something_else_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"rows": [{"name": "x"}]}')
    with pytest.raises(ValueError, match="is not of a benchmark"):
        draw.main(draw.DrawSettings(results=tmp_path / "other.json", plots=tmp_path))


def test_decode_skips_arms_once_the_time_budget_is_spent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = "--shape tiny --device cpu --budget_seconds 0 --systems transformers"
    run(decode.main, DecodeSettings, argv.split(), prog="decode")
    errors = {row["error"] for row in last_line(capsys)["rows"]}
    assert errors == {"skipped: the time budget was spent"}


def test_prefill_prints_a_row_for_every_length_with_its_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (
        "--shape tiny --device cpu --prompts 8 24 --repeats 1 --residency 0.25 "
        f"--systems expertflow transformers --plots {tmp_path}"
    )
    run(prefill.main, PrefillSettings, argv.split(), prog="prefill")
    result = last_line(capsys)
    rows = result["rows"]
    assert [(row["system"], row["residency"], row["prompt"]) for row in rows] == [
        (system, residency, prompt)
        for system, residency in (
            ("expertflow", "1.0"), ("expertflow", "0.25"), ("transformers", "1.0"),
        )
        for prompt in (8, 24)
    ]  # fmt: skip
    assert all(row["error"] is None and row["milliseconds"] > 0 for row in rows)
    assert rows[1]["ratio"] == 1.0 and rows[3]["missing_bytes"] > 0
    assert list(result["lanes"]) == [
        f"expertflow lru {residency}, prompt {prompt}"
        for residency in ("1.0", "prefetch=auto 0.25")
        for prompt in (8, 24)
    ]
    assert rows[3]["busy_ms"]["link"] > 0 and rows[5]["recorded_ms"] is None
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny-prefill.png",
        *(f"tiny-prefill-lanes-expertflow-lru-{arm}.png"
          for arm in ("1.0-8", "1.0-24", "prefetch=auto-0.25-8", "prefetch=auto-0.25-24")),
    }  # fmt: skip
