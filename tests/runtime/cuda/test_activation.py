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
from runtime.cuda.kernels.gate_up import activate
from runtime.cuda.memory.kernel_layout import ACTIVATIONS
from tests.helpers import interpreter, written_order

interpreter.mend()
COUNT = 1 << 14


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
        torch.from_numpy(gate), torch.from_numpy(up), found, ACT=ACTIVATIONS.index(activation),
        N=COUNT,
    )  # fmt: skip
    expected = written_order.activated(gate, up, activation)
    assert np.array_equal(found.numpy().view(np.int32), expected.view(np.int32))
