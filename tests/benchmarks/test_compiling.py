"""The benchmark of compiled steps, on the CPU: its arms run, and tell what they promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.common import shapes
from benchmarks.compiling import arms
from benchmarks.compiling.settings import CompilingSettings
from runtime.cuda.compiling import step_forwards
from tests.helpers.fake_cuda import fake_cuda
from tests.runtime.cuda.compiling.test_switch import FakeProcess

SMALL = replace(
    shapes.TINY,
    options=shapes.TINY.options | {
        "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 256,
    },
)  # fmt: skip
SETTINGS = CompilingSettings(shape="tiny", encoding="bf16", tokens=3, layers=2, context=64)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(shapes.SHAPES, "tiny", SMALL)
    monkeypatch.setattr(arms, "DEVICE", "cpu")
    monkeypatch.setattr(step_forwards, "CompilerProcess", FakeProcess)
    monkeypatch.setattr(FakeProcess, "made", [])
    torch._dynamo.reset()
    with fake_cuda(monkeypatch):
        yield


def test_the_first_compiled_step_is_timed_by_phases() -> None:
    found = arms.run_arm(replace(SETTINGS, arm="first"))
    assert 0 < found["tracing_s"] < found["all of it_s"] < found["first_step_s"]


def test_numbers_of_every_way_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced instead of compiled, they are nearly equal."""
    ways = {"as it is": {}, "rounding as eager": arms.WAYS["rounding as eager"]}
    monkeypatch.setattr(arms, "WAYS", ways)
    found = arms.run_arm(replace(SETTINGS, arm="numbers"))
    assert found["plain again"]["rows_equal"] == 1.0
    for way in ways:
        assert found[way]["argmax_agrees"] == 1.0
        assert {one["equal"] for one in found[way]["operations"]} == {1.0}


def test_auto_tells_of_a_switch_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeProcess, "failure", "no compiler here")
    monkeypatch.setattr(arms, "LONGEST_WAIT", 0.1)

    class Ended(FakeProcess):
        is_running = property(lambda _: False, lambda *_: None)

    monkeypatch.setattr(step_forwards, "CompilerProcess", Ended)
    found = arms.run_arm(replace(SETTINGS, arm="auto"))
    assert found["failure"] == "no compiler here"
    assert found["equal_tokens"] == found["of"] == 3
