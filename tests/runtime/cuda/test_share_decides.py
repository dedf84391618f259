"""Whether the CPU gets a share at all: what it lacks is said, and everything runs without it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cpu.service import CpuExperts
from runtime.cuda.memory.pinned import PinnedMemory
from runtime.cuda.share import cpu_share
from runtime.cuda.share.cpu_share import CpuShare
from tests.helpers.device_twins import Twin
from tests.helpers.fake_cuda import fake_cuda
from tests.runtime.cuda.test_cpu_share import CPU, HIDDEN, TOP_K, shape_of, twin_of


class Calls:
    """Stands in for the kernels of a step."""

    def __init__(self, row_H: Tensor) -> None:
        self.compiled: dict[str, Any] = {"gate_up": None, "down": None}
        self._row_H = row_H

    def one_expert(self, stored_N: Tensor, x: Tensor) -> Tensor:
        return self._row_H


def settled_share(twin: Twin) -> CpuShare:
    """A share that has been prepared, as far as it can be, and taken up by a step."""
    share = CpuShare(twin.layout, host_of(twin), TOP_K, CPU, lambda: 1.0, asked="auto")
    call: Any = Calls(torch.zeros(HIDDEN))
    share.begin_step(call)
    assert share._builder is not None
    share._builder.join()
    share.begin_step(call)
    return share


def test_a_share_that_cannot_be_is_off_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = twin_of("packed")
    with fake_cuda(monkeypatch):
        share = settled_share(twin)
        share.count_step(1.0)
        assert share.verdict == "the CPU computes no experts: the GPU's kernels are interpreted"
        share.close()


def host_of(twin: Twin) -> Any:
    return SimpleNamespace(expert_blocks=[twin.expert_block], layers=twin.layers)


def no_memory(*_: object, **__: object) -> Any:
    raise MemoryError("no memory is left")


def test_no_memory_for_a_doorbell_leaves_steps_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PinnedMemory, "empty", no_memory)
    twin = twin_of("mxfp4")
    with fake_cuda(monkeypatch):
        with pytest.warns(UserWarning, match="no memory is left"):
            share = CpuShare(twin.layout, host_of(twin), TOP_K, CPU, lambda: 1.0, asked=True)
        call: Any = Calls(torch.zeros(HIDDEN))
        for _ in range(2):
            share.begin_step(call)
            share.count_step(1.0)
            share.rest()
            share.forget()
        assert share.order is None
        assert share.verdict == "the CPU computes no experts: no memory is left"
        share.close()


@pytest.mark.parametrize("fault", ["memory", "threads"])
def test_a_service_that_does_not_start_leaves_nothing_to_the_cpu(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = twin_of("mxfp4")
    monkeypatch.setattr(cpu_share, "shape_of", lambda *_: shape_of(twin))
    monkeypatch.setattr(cpu_share, "usable_cores", lambda: [0, 1, 2, 3])
    if fault == "memory":
        monkeypatch.setattr(cpu_share, "CpuExperts", no_memory)
    else:
        threadless = partial(CpuExperts, cores=())
        monkeypatch.setattr(
            cpu_share, "CpuExperts", lambda *args, cores, memory: threadless(*args, memory=memory)
        )
    with fake_cuda(monkeypatch):
        share = settled_share(twin)
        reason = "no memory is left" if fault == "memory" else "the system starts no threads"
        assert share.verdict.startswith(f"the CPU computes no experts: {reason}")
        assert share.order is not None and not share.order._share.any()
        share.close()
