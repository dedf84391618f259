"""The kernels outside of captured steps, by Triton's interpreter: many tokens, embedding, head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")

from routing.layers import Routes
from routing.topology import NO_EXPERT
from runtime.cache.policies import LRU
from runtime.cuda.memory import host_dense as dense
from runtime.cuda.prefill.grouped_experts import run_grouped, table_of
from runtime.engine.experts import sort_pairs, spans_of
from tests.helpers.device_twins import Twin, routes
from tests.helpers.tiny import tiny_model

EXPERTS, TOP_K = 6, 2
OSS = {"activation": "clamped_swiglu", "alternating": True, "has_bias": True}


class Arriving:
    """A pool whose experts arrive in the given order, two at a time, in the same two slots."""

    def __init__(self, twin: Twin, order: list[int]) -> None:
        self._layers, self._order = twin.layers, order
        self.expert_block, self.slots_SN, self.num_experts = (
            twin.expert_block,
            twin.slots_SN,
            EXPERTS,
        )
        self.workspace_RN = (
            twin.expert_blocks.new_zeros(1, twin.expert_block.units) if twin.packed else None
        )

    def serve_groups(
        self, layer: int, experts: list[int], _: Any
    ) -> Iterator[list[tuple[int, int]]]:
        coming = [expert for expert in self._order if expert in experts]
        for start in range(0, len(coming), 2):
            group = [(expert, slot) for slot, expert in enumerate(coming[start : start + 2])]
            for expert, slot in group:
                self.slots_SN[slot] = self._layers[layer][expert]
            yield group
            self.slots_SN.fill_(-1)  # NaN: nobody may look again


@pytest.mark.parametrize(
    ("num_tokens", "options"),
    [
        (7, {}),
        (40, {}),
        (7, OSS),
        (7, {"dtype": torch.float16, "activation": "gelu"}),
        (7, OSS | {"dtype": torch.bfloat16, "packed": True}),
    ],
    ids=["few", "several tiles", "gpt-oss", "gelu in fp16", "gpt-oss in packed bf16"],
)
def test_many_tokens_compute_what_float32_does_in_any_order_of_arrival(
    num_tokens: int, options: dict[str, Any]
) -> None:
    twin = Twin(LRU(1, EXPERTS), num_layers=1, num_experts=EXPERTS, num_slots=2, **options)
    x_TH = torch.randn(num_tokens, 40).to(twin.layout.dtype)
    experts_TK = routes(np.random.default_rng(0), num_tokens, EXPERTS, TOP_K)
    experts_TK[1, 0] = NO_EXPERT
    weights_TK = torch.rand(num_tokens, TOP_K).to(twin.layout.dtype)
    outputs = []
    for order in (list(range(EXPERTS)), [4, 1, 5, 0, 3, 2]):
        pool: Any = Arriving(twin, order)
        outputs.append(run_grouped(pool, twin.layout, 0, x_TH, Routes(experts_TK, weights_TK)))
    assert torch.equal(*outputs)
    expected = twin.expected(0, x_TH, experts_TK, weights_TK)
    error = (outputs[0].float() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[x_TH.dtype]


@given(st.lists(st.integers(-1, EXPERTS), min_size=1, max_size=30))
def test_pairs_are_sorted_by_expert_and_those_of_none_have_no_span(experts: list[int]) -> None:
    order_P, counts = sort_pairs(torch.tensor(experts)[:, None], EXPERTS)
    spans = spans_of(counts.tolist())
    assert set(spans) == set(experts) - {-1, EXPERTS}
    for expert, span in spans.items():
        pairs = order_P[span].tolist()
        assert pairs == [pair for pair, chosen in enumerate(experts) if chosen == expert]


def test_tiles_cover_every_row_once() -> None:
    tiles = table_of([(slice(0, 5), 9), (slice(5, 42), 3), (slice(42, 58), 1)], 16)
    covered = [row for first, count, _ in tiles for row in range(first, first + count)]
    assert covered == list(range(58))
    assert all(count <= 16 for _, count, _ in tiles)
    assert [slot for _, _, slot in tiles] == [9, 3, 3, 3, 1]


@pytest.mark.parametrize("width", [40, 64])
def test_an_embedding_on_the_host_gives_its_rows(width: int) -> None:
    embedding = nn.Embedding(50, width)
    ids = torch.randint(50, (2, 3))
    assert torch.equal(dense.embed(embedding, ids), embedding(ids))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, dense.MOST_ROWS + 1)])
@torch.no_grad()
def test_a_head_on_the_host_gives_its_logits(shape: tuple[int, int], bias: bool) -> None:
    """Also for more tokens than one launch serves, and a vocabulary of no whole tiles."""
    linear = nn.Linear(40, 50, bias=bias)
    x = torch.randn(*shape, 40)
    torch.testing.assert_close(dense.head(linear, x), linear(x), rtol=1e-5, atol=1e-5)


def test_modules_whose_forward_somebody_replaced_stay_on_the_device() -> None:
    model: Any = tiny_model("olmoe")
    table, head = model.model.embed_tokens.weight.nbytes, model.lm_head.weight.nbytes
    assert dense.movable_bytes(model) == table + head
    model.lm_head.forward = model.lm_head.forward
    assert dense.movable_bytes(model) == table
    model.model.embed_tokens.forward = model.model.embed_tokens.forward
    assert dense.movable_bytes(model) == 0
