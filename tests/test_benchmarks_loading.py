"""benchmarks.loading: what is compared is one model, and what is measured is real."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from benchmarks.loading import LoadingSettings, config, plan_arms, write_checkpoints
from benchmarks.loading_arms import ARMS, READS, Peak, loaders, measure_reads
from runtime.plan import plan

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


def allocate_until_seen(peak: Peak) -> None:
    """50 MB, held until the sampling thread has had its turn."""
    held = torch.ones(50_000_000, dtype=torch.uint8)
    deadline = time.monotonic() + 30
    while peak.most < peak.start + held.nbytes // 2 and time.monotonic() < deadline:
        time.sleep(0.01)


def test_peak_memory_is_what_was_allocated_though_it_is_freed_again() -> None:
    with Peak() as peak:
        allocate_until_seen(peak)
    assert 45_000_000 < peak.num_bytes < 200_000_000


def test_garbage_from_before_hides_none_of_it() -> None:
    garbage: list[Any] = [torch.ones(100_000_000, dtype=torch.uint8)]
    garbage.append(garbage)
    del garbage
    with Peak() as peak:
        gc.collect()
        allocate_until_seen(peak)
    assert 45_000_000 < peak.num_bytes < 200_000_000


def test_without_accelerate_its_arm_is_left_out() -> None:
    with_it, without = ([name for name, _ in plan_arms(have)] for have in (True, False))
    assert [name for name in with_it if name not in without] == [ARMS[1]]
