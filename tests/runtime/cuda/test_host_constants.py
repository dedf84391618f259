"""What models make on the host in every step, where a captured step can read it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runtime.cuda import host_constants
from runtime.cuda.host_constants import HostConstants


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> HostConstants:
    """Without a GPU: pinning copies, and refuses what CUDA refuses."""

    def pinned(tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    return HostConstants()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_equal_constants_are_kept_once_and_others_apart(
    dtype: torch.dtype, constants: HostConstants
) -> None:
    first = constants.pinned(torch.ones(3, dtype=dtype))
    assert constants.pinned(torch.ones(3, dtype=dtype)) is first
    others = torch.zeros(3, dtype=dtype), torch.ones(1, 3, dtype=dtype), torch.ones((), dtype=dtype)
    for other in others:
        kept = constants.pinned(other)
        assert kept is not first
        assert torch.equal(kept, other)


def test_expanded_constants_are_pinned(constants: HostConstants) -> None:
    """Phi-MoE's frequencies, repeated for every sequence."""
    expanded = torch.arange(4.0)[None, :, None].expand(3, -1, 1)
    assert torch.equal(constants.pinned(expanded), expanded)


def test_copies_that_leave_the_host_come_from_what_is_kept(
    constants: HostConstants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_constants, "_leaves_host", lambda source, target: target is not None)
    constant, target = torch.arange(3.0), torch.zeros(3)
    with constants:
        copied = constant.to(torch.device("cpu"), torch.float64)
        target.copy_(constant)
    assert torch.equal(copied, constant.double())
    assert torch.equal(target, constant)
    assert len(constants._pinned) == 1


def test_copies_on_the_host_are_left_alone(constants: HostConstants) -> None:
    with constants:
        assert torch.arange(3.0).to(torch.float64).dtype == torch.float64
        torch.zeros(3).copy_(torch.ones(3))
    assert not constants._pinned
