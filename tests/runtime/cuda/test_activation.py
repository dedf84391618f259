"""The gated activation of the GPU's kernels is the CPU's, operation by operation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from runtime.cpu.shape import ACTIVATIONS as ON_THE_CPU
from runtime.cuda.kernels.gate_up import Activation, activate
from runtime.cuda.memory.kernel_layout import ACTIVATIONS
from runtime.weights.gated_experts import BOUNDED, Gating
from runtime.weights.gated_experts import activate as on_the_host
from tests.helpers import interpreter, written_order

interpreter.mend()
COUNT = 1 << 14
BOUNDS = 3.5, 10.0


@triton.jit
def activations(gate, up, to, ACT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(to + at, activate(tl.load(gate + at), tl.load(up + at), ACT))


def fused(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """A multiply-add that rounds once, which the interpreter's does not."""
    return TensorHandle(written_order.fma(x.data, y.data, z.data), z.dtype.scalar)


@pytest.mark.parametrize("activation", ON_THE_CPU)
def test_the_kernels_activation_has_the_bits_of_the_written_order(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_fma", fused)
    random = np.random.default_rng(0)
    sizes = 10.0 ** random.integers(-6, 3, (2, COUNT))
    gate, up = (random.standard_normal((2, COUNT)) * sizes).astype(np.float32)
    gate[:4] = 0.0, -0.0, 1e30, -1e30
    found = torch.empty(COUNT)
    activations[(1,)](
        torch.from_numpy(gate), torch.from_numpy(up), found,
        ACT=Activation(ACTIVATIONS.index(activation), *BOUNDS), N=COUNT,
    )  # fmt: skip
    expected = written_order.activated(gate, up, activation, BOUNDS)
    assert np.array_equal(found.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("activation", BOUNDED)
def test_bounded_activations_are_torchs_to_rounding(activation: str) -> None:
    sizes = 10.0 ** np.random.default_rng(0).integers(-6, 3, (2, COUNT))
    gate, up = torch.randn(2, COUNT) * torch.from_numpy(sizes).float()
    found = torch.empty(COUNT)
    act = Activation(ACTIVATIONS.index(activation), *BOUNDS)
    activations[(1,)](gate, up, found, ACT=act, N=COUNT)
    expected = on_the_host(torch.cat([gate, up]), Gating(activation, bounds=BOUNDS))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-30)
