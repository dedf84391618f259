"""The choice of a router in one kernel, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

import runtime.cuda.kernels.custom_ops
from runtime.cuda.decode.fused_top_k import FusedTopK, FusedTopKPass
from runtime.cuda.kernels.dense import top_k as kernel
from tests.helpers import interpreter

interpreter.mend()
assert runtime.cuda.kernels.custom_ops
SPECIAL = [0.0, -0.0, 1.5, -2.0, 1e-40, 65504.0, float("inf"), float("-inf"), float("nan")]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(SPECIAL), min_size=3, max_size=3 * 5).filter(
        lambda x: len(x) % 3 == 0
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 3),
)
def test_values_are_torchs_whatever_the_numbers(
    numbers: list[float], dtype: torch.dtype, k: int
) -> None:
    x = torch.tensor(numbers).to(dtype).view(-1, 3)
    values, indices = kernel.top_k(x, k)
    torch.testing.assert_close(values, torch.topk(x, k).values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, x.gather(-1, indices), rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize(("experts", "chosen"), [(64, 8), (60, 4), (12, 3), (300, 9)])
def test_indices_are_torchs_where_no_two_are_equal(experts: int, chosen: int) -> None:
    x = torch.randn(2, 3, experts, generator=torch.Generator().manual_seed(experts))
    values, indices = kernel.top_k(x, chosen)
    expected = torch.topk(x, chosen)
    assert torch.equal(indices, expected.indices) and torch.equal(values, expected.values)


def test_of_equals_the_lower_index_is_chosen() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert kernel.top_k(x, 4)[1].tolist() == [[1, 3, 2, 4]]


def test_calls_of_torch_are_replaced_where_the_kernel_fits() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    with FusedTopK():
        for both in (
            torch.topk(x, 2),
            x.topk(k=2, dim=1),
            torch.topk(x, k=2, dim=-1, sorted=False),
        ):
            assert both.values.tolist() == [[3.0, 3.0]]
            assert both.indices.tolist() == [[1, 3]]
        lowest = torch.topk(x, 2, largest=False)
        assert lowest.values.tolist() == [[1.0, 2.0]]
        assert torch.topk(x.double(), 2).values.dtype == torch.float64
        assert torch.topk(torch.arange(2000.0), 1).indices.tolist() == [1999]
        assert torch.topk(x.T.contiguous(), 1, dim=0).values.tolist() == [[3.0]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    own = kernel.top_k

    def counted(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        seen.append((*x.shape, k))
        return own(x, k)

    monkeypatch.setattr(kernel, "top_k", counted)
    return seen


def test_graphs_that_are_compiled_take_the_kernel_too(taken: list[tuple[int, ...]]) -> None:
    def router(x: Tensor) -> Tensor:
        weights, indices = torch.topk(x.softmax(-1), 2, dim=-1)
        lowest = torch.topk(x, 1, largest=False).values
        return weights * indices + lowest

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    traced = make_fx(router, tracing_mode="fake")(x)
    expected = traced(x)
    assert not taken
    FusedTopKPass()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    assert torch.equal(traced(x), expected)
    assert taken == [(3, 8, 2)]
    assert len(traced.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)) == 1
