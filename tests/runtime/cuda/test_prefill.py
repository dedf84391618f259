"""The kernels outside of captured steps, by Triton's interpreter: many tokens, embedding, head."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("triton")

from routing.layers import Routes
from routing.topology import NO_EXPERT
from runtime.cache.policies import LRU
from runtime.cache.stats import Stats
from runtime.cuda.memory import host_dense as dense
from runtime.cuda.prefill import grouped_experts, tiling
from runtime.cuda.prefill.grouped_experts import GroupedExperts
from runtime.cuda.prefill.products import Work, sort
from runtime.cuda.prefill.slots import workspace
from runtime.cuda.prefill.streaming_pool import Ahead, StreamingPool
from runtime.cuda.prefill.tiling import LEAST_ROWS, most_tiles, table_of
from runtime.engine.experts import sort_pairs, spans_of
from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from tests.helpers.device_twins import Twin, routes
from tests.helpers.fake_cuda import without_streams
from tests.helpers.tiny import tiny_model

EXPERTS, TOP_K = 6, 2
OSS = {"activation": "clamped_swiglu", "alternating": True, "has_bias": True}
BF16 = torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    without_streams(monkeypatch)


class Prompts:
    """Layers of random experts in a host tier, and a pool of `num_slots` that runs prompts."""

    def __init__(self, twin: Twin, num_slots: int) -> None:
        host: Any = self
        self.layers, block = twin.layers, twin.expert_block
        layers: Any = [SimpleNamespace(num_experts=EXPERTS, name="layer")] * len(self.layers)
        self.stats = Stats(layers=layers, num_slots=num_slots, policy="lru")
        policy = LRU(len(self.layers), EXPERTS)
        self.pool = StreamingPool(block, num_slots, CPU, host, policy, self.stats, twin.layout)
        self.pool.slots_SN.fill_(-1)  # NaN: nobody may look before an expert has come
        counts = [EXPERTS] * len(self.layers)
        self.experts = GroupedExperts(self.pool, twin.layout, self.stats, counts)

    def send(self, layer: int, expert: int, into: Tensor) -> None:
        into.copy_(self.layers[layer][expert])

    def link_bytes(self, layer: int) -> int:
        return 2 * self.pool.expert_block.stored_units

    def run(self, layer: int, x_TH: Tensor, chosen: Routes, **ahead: Any) -> Tensor:
        """A pass of one layer."""
        y_TH = self.experts.run(layer, x_TH, chosen, **ahead)
        self.experts.end_pass()
        return y_TH


def drawn(twin: Twin, num_tokens: int, seed: int = 0) -> tuple[Tensor, Routes]:
    """Random hidden states, and routes of which one is of no expert."""
    x_TH = torch.randn(num_tokens, twin.layout.hidden).to(twin.layout.dtype)
    experts_TK = routes(np.random.default_rng(seed), num_tokens, EXPERTS, TOP_K)
    experts_TK[1, 0], experts_TK[2, 1] = NO_EXPERT, EXPERTS
    return x_TH, Routes(experts_TK, torch.rand(num_tokens, TOP_K).to(twin.layout.dtype))


ENCODINGS: dict[str, Callable[[int, int], Encoding]] = {
    "mxfp4": lambda n, k: MXFP4(),
    "fp8": lambda n, k: FP8Block(rows=8, columns=32),
    "mxfp8": lambda n, k: FP8Block(columns=32, scale=torch.uint8),
    "int4": lambda n, k: Int4Group(columns=8),
    "int4 with zeros": lambda n, k: Int4Group(columns=8, scale=torch.float16, zeros=True),
    "nvfp4": lambda n, k: NVFP4(rows=n, divides=True),
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "few": (7, {}),
    "several tiles": (70, {}),
    "gpt-oss": (7, OSS),
    "gelu in fp16": (7, {"dtype": torch.float16, "activation": "gelu"}),
    "packed": (7, {"dtype": BF16, "packed": True}),
    "packed, several tiles": (70, {"dtype": BF16, "packed": True, "hidden": 72, "width": 88}),
    "gpt-oss, packed": (7, OSS | {"dtype": BF16, "packed": True, "width": 72}),
    "packed, tall": (200, {"dtype": BF16, "packed": True, "width": 72}),
} | {
    name: (7, {"dtype": BF16, "hidden": 96, "width": 32, "encoding": encoding})
    for name, encoding in ENCODINGS.items()
} | {"gpt-oss in mxfp4": (70, OSS | {"dtype": BF16, "hidden": 96, "width": 96,
                                     "encoding": ENCODINGS["mxfp4"]})}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_many_tokens_compute_what_float32_does_whatever_is_resident(name: str) -> None:
    """All there and nobody asks; all there but on their way; two slots; in waves, some resident."""
    num_tokens, options = CASES[name]
    twin = Twin(LRU(1, EXPERTS), num_layers=1, num_experts=EXPERTS, num_slots=2, **options)
    x_TH, chosen = drawn(twin, num_tokens)
    outputs = []
    for num_slots in (EXPERTS, 2, 4):
        prompts = Prompts(twin, num_slots)
        outputs += [prompts.run(0, x_TH, chosen) for _ in range(1 + (num_slots != 2))]
        assert prompts.pool.is_full == (num_slots == EXPERTS)
        prompts.pool.cache.check_integrity()
    assert all(torch.equal(one, outputs[0]) for one in outputs)
    ids_TK = torch.where(chosen.experts_TK < EXPERTS, chosen.experts_TK, NO_EXPERT)
    expected = twin.expected(0, x_TH, ids_TK, chosen.weights_TK)
    error = (outputs[0].float() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: 1e-5, torch.float16: 3e-3, BF16: 2e-2}[x_TH.dtype]


@pytest.mark.parametrize("name", ["packed", "mxfp4"])
def test_experts_of_many_rows_are_unpacked_first_whatever_is_resident(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens, options = CASES[name]
    twin = Twin(LRU(1, EXPERTS), num_layers=1, num_experts=EXPERTS, num_slots=2, **options)
    x_TH, chosen = drawn(twin, num_tokens)
    decoded = Prompts(twin, EXPERTS).run(0, x_TH, chosen)
    monkeypatch.setattr(tiling, "MOST_DECODED_ROWS", 0)
    outputs = []
    for num_slots in (EXPERTS, 3):
        prompts = Prompts(twin, num_slots)
        prompts.pool.workspace_RN = workspace(twin.expert_block, CPU)[:4]
        prompts.experts = GroupedExperts(prompts.pool, twin.layout, prompts.stats, [EXPERTS])
        outputs += [prompts.run(0, x_TH, chosen) for _ in range(1 + (num_slots == EXPERTS))]
    assert all(torch.equal(one, outputs[0]) for one in outputs)
    torch.testing.assert_close(outputs[0], decoded, rtol=2e-2, atol=2e-2)


def test_rows_of_2880_are_no_whole_tiles() -> None:
    options: dict[str, Any] = OSS | {"dtype": BF16, "packed": True}
    twin = Twin(LRU(1, EXPERTS), num_layers=1, num_experts=EXPERTS, num_slots=2, hidden=2880,
                width=8, **options)  # fmt: skip
    x_TH, chosen = drawn(twin, 3)
    y_TH = Prompts(twin, EXPERTS).run(0, x_TH, chosen)
    ids_TK = torch.where(chosen.experts_TK < EXPERTS, chosen.experts_TK, NO_EXPERT)
    expected = twin.expected(0, x_TH, ids_TK, chosen.weights_TK)
    assert (y_TH.float() - expected).abs().max() / expected.abs().max() < 2e-2


def test_with_every_expert_resident_nobody_waits_and_the_counts_come_when_the_pass_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin = Twin(LRU(2, EXPERTS), num_layers=2, num_experts=EXPERTS, num_slots=2)
    prompts = Prompts(twin, 2 * EXPERTS)
    x_TH, chosen = drawn(twin, 5)
    for layer in range(2):
        prompts.experts.run(layer, x_TH, chosen)
    prompts.experts.end_pass()
    used = chosen.experts_TK[(chosen.experts_TK >= 0) & (chosen.experts_TK < EXPERTS)].unique()
    assert prompts.stats.misses_L.tolist() == [len(used)] * 2
    assert prompts.pool.is_full  # the first pass that ended sent for the rest

    def waited(*_: Any) -> None:
        raise AssertionError("the host waited")

    monkeypatch.setattr(grouped_experts, "told", waited)
    prompts.stats.reset()
    want = [prompts.experts.run(layer, x_TH, chosen) for layer in (0, 1, 0)]
    assert torch.equal(want[0], want[2])
    assert prompts.stats.hits_L.tolist() == [len(used)] * 2  # of what was before, for layer 0 anew
    prompts.experts.end_pass()
    assert prompts.stats.hits_L.tolist() == [2 * len(used), len(used)]
    assert (prompts.stats.misses, prompts.stats.bytes_loaded) == (0, 0)


def test_what_the_next_layer_wants_is_sent_for_behind_the_missing_of_this_one() -> None:
    twin = Twin(LRU(2, EXPERTS), num_layers=2, num_experts=EXPERTS, num_slots=2)
    prompts = Prompts(twin, 2 * EXPERTS - 1)
    x_TH, chosen = drawn(twin, 12)
    wanted = np.array([0, 2, 1, 5, 0, 0])
    prompts.run(0, x_TH, chosen, ahead=lambda: Ahead(1, lambda: wanted))
    assert prompts.stats.prefetches == 2  # what a single token wants is too uncertain
    alone = Prompts(twin, 2 * EXPERTS - 1)
    assert torch.equal(prompts.run(1, x_TH, chosen), alone.run(1, x_TH, chosen))
    assert prompts.stats.prefetches_used == 2


def test_a_pass_without_tokens_has_no_result() -> None:
    twin = Twin(LRU(1, EXPERTS), num_layers=1, num_experts=EXPERTS, num_slots=2)
    none = Routes(torch.zeros(0, TOP_K, dtype=torch.int64), torch.zeros(0, TOP_K))
    assert Prompts(twin, 3).run(0, torch.zeros(0, 40), none).shape == (0, 40)


# ---------------------------------------------------------------------- sorting


@given(st.lists(st.integers(-1, EXPERTS), min_size=1, max_size=30))
def test_pairs_are_sorted_by_expert_and_those_of_none_have_no_span(experts: list[int]) -> None:
    order_P, counts = sort_pairs(torch.tensor(experts)[:, None], EXPERTS)
    spans = spans_of(counts.tolist())
    assert set(spans) == set(experts) - {-1, EXPERTS}
    for expert, span in spans.items():
        pairs = order_P[span].tolist()
        assert pairs == [pair for pair, chosen in enumerate(experts) if chosen == expert]


@pytest.mark.parametrize(("num_tokens", "group"), [(1, 6), (3, 2), (90, 6), (700, 4)])
def test_the_device_sorts_pairs_and_cuts_tiles_as_the_host_does(
    num_tokens: int, group: int
) -> None:
    experts_TK = torch.randint(-1, EXPERTS + 1, (num_tokens, TOP_K))
    layout = Twin(LRU(1, EXPERTS), num_layers=1, num_experts=EXPERTS).layout
    work = Work.of(experts_TK.numel(), EXPERTS, layout, CPU)
    counts_E, slots_E = torch.zeros(2, EXPERTS, dtype=torch.int32)
    slots_E.copy_(torch.randperm(EXPERTS))
    sort(experts_TK, work, counts_E, slots_E, group, LEAST_ROWS)
    order_P, counts = sort_pairs(experts_TK, EXPERTS)
    assert counts_E.tolist() == counts[1:-1].tolist()
    num_real = int(counts_E.sum())
    assert work.order_P[:num_real].tolist() == order_P[counts[0] :][:num_real].tolist()
    groups = np.split(np.arange(EXPERTS), range(group, EXPERTS, group))
    slots = [slots_E.numpy()[some] for some in groups]
    table = table_of([some.tolist() for some in groups], slots, counts_E.numpy(), LEAST_ROWS)
    assert work.starts_G[: len(groups) + 1].tolist() == table.starts_G.tolist()
    assert work.tiles_N3[: len(table.tiles_N3)].tolist() == table.tiles_N3.tolist()
    assert len(table.tiles_N3) <= most_tiles(experts_TK.numel(), EXPERTS, LEAST_ROWS)


def test_tiles_cover_every_row_once() -> None:
    counts = np.array([5, 0, 37, 16])
    tiles_N3, starts_G = table_of([[2, 0], [3]], [[9, 3], [1]], counts, 16)
    rows = [row for first, num, _ in tiles_N3.tolist() for row in range(first, first + num)]
    assert rows == [*range(5, 42), *range(5), *range(42, 58)]
    assert tiles_N3[:, 1].max() <= 16
    assert tiles_N3[:, 2].tolist() == [9, 9, 9, 3, 1]
    assert starts_G.tolist() == [0, 4, 5]


# ---------------------------------------------------------------------- embedding and head


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
