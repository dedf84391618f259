"""benchmarks.loading: all arms load one model, and the measured peak is real."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from benchmarks.common.shapes import SHAPES, TINY
from benchmarks.loading import pinning_arms
from benchmarks.loading.arms import ARMS, READS, loaders, measure_reads
from benchmarks.loading.pinning import describe
from benchmarks.loading.pinning import write_checkpoints as write_checkpoints_to_pin
from benchmarks.loading.runner import config, plan_arms, write_checkpoints
from benchmarks.loading.settings import LoadingSettings
from runtime.plan import plan

ROOT = Path(__file__).parents[2]
SETTINGS = LoadingSettings(layers=1, experts=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loading")
    facts = write_checkpoints(SETTINGS, path)
    assert facts["expert_bytes"] == 32 * 3 * 1024 * 256 * 2
    assert facts["checkpoint_bytes"] > facts["expert_bytes"]
    return path


def test_all_arms_load_the_same_model(folder: Path) -> None:
    arms = loaders(folder)
    tokens = torch.arange(1, 9)[None]
    models: list[Any] = [arms[name]() for name in (ARMS[0], ARMS[2], ARMS[3])]
    with torch.inference_mode():
        stock, hub, prepared = (model(tokens).logits for model in models)
    assert torch.equal(hub, prepared)
    torch.testing.assert_close(hub, stock, rtol=0.1, atol=0.1)


def test_every_expert_is_read(folder: Path) -> None:
    assert all(measure_reads(arm, folder)["read_s"] > 0 for arm in READS)


def test_the_synthetic_checkpoint_is_a_whole_one_of_the_promised_size(folder: Path) -> None:
    model: Any = runtime.load(folder / "hub", memory=1.0).expertflow.detach()
    assert model.config.num_experts == config(SETTINGS)["num_experts"] == 32
    numel = sum(p.numel() for p in model.parameters())
    assert numel * 2 == plan(folder / "hub", 1.0).resident_bytes


PEAK = """
import gc, time, torch
from benchmarks.loading.memory import Peak
{before}
with Peak() as peak:
    gc.collect()
    held = torch.ones(15_000_000, dtype=torch.uint8)
    deadline = time.monotonic() + 30
    while peak.num_bytes < 14_000_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    del held
print(peak.num_bytes)
"""
GARBAGE = """
garbage = [torch.ones(100_000_000, dtype=torch.uint8)]
garbage.append(garbage)
del garbage
"""
FREED = """
freed = torch.ones(30_000_000, dtype=torch.uint8)
del freed  # from here on glibc keeps a heap of blocks as large as this one
blocks = [torch.ones(20_000_000, dtype=torch.uint8) for _ in range(10)]
above = torch.ones(2_000)  # below it the heap gives nothing back
del blocks
"""


@pytest.mark.parametrize("before", ["", GARBAGE, FREED], ids=["fresh", "garbage", "freed"])
def test_peak_memory_is_what_was_allocated_whatever_was_freed_before(before: str) -> None:
    """In a process of its own, as the benchmark's arms are, apart from what other tests freed."""
    command = [sys.executable, "-c", PEAK.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 13_000_000 < int(done.stdout) < 30_000_000


def test_without_accelerate_its_arm_is_left_out() -> None:
    with_it, without = ([name for name, _ in plan_arms(have)] for have in (True, False))
    assert [name for name in with_it if name not in without] == [ARMS[1]]


@pytest.mark.parametrize("arm", pinning_arms.ARMS)
def test_every_arm_pins_the_same_experts(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from tests.helpers.fake_cuda import fake_cuda

    sizes = {"num_hidden_layers": 3, "num_experts": 8}
    monkeypatch.setitem(SHAPES, "tiny", replace(TINY, options=TINY.options | sizes))
    monkeypatch.setattr("runtime.cuda.memory.shared_memory.FOLDER", tmp_path)
    facts = write_checkpoints_to_pin("tiny", tmp_path)
    with fake_cuda(monkeypatch):
        values = pinning_arms.measure(arm, tmp_path, 1, "cpu")
    (one,) = values["rounds"]
    assert one["s"] > 0 and one["read"] > 0
    assert (one["pack"] == 0) == (one["check"] > 0) == (arm in ("packed", "shared"))
    if arm == "packed":
        assert values["equal_experts"] == 3 * 8
    line = describe(arm, values, facts["expert_bytes"])
    assert line.startswith(f"{arm}: ") and "thread-seconds: read" in line
