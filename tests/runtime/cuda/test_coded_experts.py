"""Experts in codes: in their blocks, in pinned memory, and decoded where no kernel runs them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from runtime.cache.policies import LRU
from runtime.cache.stats import Stats
from runtime.cuda.memory.expert_block import ALIGNMENT, CHUNK, ExpertBlock
from runtime.cuda.memory.pinned import PinnedMemory, untouched
from runtime.cuda.memory.pinned_experts import PinnedExperts
from runtime.cuda.memory.unpacking import kernels_decode, unpack_blocks
from runtime.cuda.prefill.slots import Landing
from runtime.cuda.prefill.streaming_pool import PROBES, StreamingPool
from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.coded import CodedMatrix, Coding, decode_expert
from runtime.weights.encodings.encoding import CODES, Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from runtime.weights.store import ExpertStore
from tests.helpers import interpreter
from tests.helpers.fake_cuda import fake_pinning

interpreter.mend()

BF16, EXPERTS = torch.bfloat16, 4
CPU = torch.device("cpu")
GATE_UP, DOWN = (64, 32), (32, 32)


class Case(NamedTuple):
    """Matrices [N, K] in an encoding each; None for a plain one."""

    gate_up: Encoding | None
    down: Encoding | None
    transposed: bool = False
    """The model's parameters are [K, N]."""
    dtype: torch.dtype = BF16


def both(encoding: Encoding, **rest: Any) -> Case:
    """Both matrices in one encoding."""
    return Case(encoding, encoding, **rest)


CASES = {
    "mxfp4": Case(MXFP4(), MXFP4()),
    "mxfp4 transposed": Case(MXFP4(), MXFP4(), transposed=True),
    "fp8 blocks": Case(FP8Block(rows=16, columns=16), FP8Block(rows=16, columns=16)),
    "fp8 powers": both(FP8Block(rows=8, columns=24, scale=torch.uint8), dtype=torch.float16),
    "fp8 rows": both(FP8Block(columns=1 << 40, scale=BF16)),
    "int4": Case(Int4Group(columns=16), Int4Group(columns=16)),
    "int4 with zeros": both(Int4Group(columns=8, zeros=True, scale=torch.float16)),
    "nvfp4": Case(NVFP4(rows=32), NVFP4(rows=32)),
    "int4 in odd groups": both(Int4Group(columns=4)),
    "down alone": Case(None, MXFP4()),
    "gate and up alone": Case(FP8Block(rows=16, columns=16), None, transposed=True),
    "two encodings": Case(MXFP4(), FP8Block(rows=32, columns=32), dtype=torch.float32),
}
cases = pytest.mark.parametrize("name", CASES)


class RandomStore(ExpertStore):
    """Two layers of experts of random codes; `broken` cannot be read."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.broken: tuple[int, int] | None = None
        self.stored = [
            [
                random_tensors(self.stored_specs(layer), 10 * layer + expert)
                for expert in range(EXPERTS)
            ]
            for layer in range(2)
        ]

    def specs(self, layer: int) -> Specs:
        matrices = {"gate_up_proj": GATE_UP, "down_proj": DOWN}
        specs: dict[str, Spec] = {}
        for name, (rows, columns) in matrices.items():
            shape = (columns, rows) if self.case.transposed else (rows, columns)
            specs |= {name: Spec(shape, self.case.dtype)}
            specs |= {f"{name}_bias": Spec((rows,), self.case.dtype)}
        return specs

    def coding(self, layer: int) -> Coding:
        pairs = {"gate_up_proj": (self.case.gate_up, GATE_UP), "down_proj": (self.case.down, DOWN)}
        return {
            name: CodedMatrix(encoding, shape, self.case.transposed)
            for name, (encoding, shape) in pairs.items()
            if encoding is not None
        }

    def whole_specs(self, layer: int) -> Specs:
        raise NotImplementedError

    def restore(self, layer: int) -> None:
        raise NotImplementedError

    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        decode_expert(self.stored[layer][expert], self.coding(layer), into)

    def read_stored(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        if (layer, expert) == self.broken:
            raise ValueError("the file ends here")
        for name, tensor in self.stored[layer][expert].items():
            into[name].copy_(tensor)

    def weights(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The decoded parameters."""
        specs = self.specs(layer).items()
        into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs}
        self.read(layer, expert, into)
        return into


def random_tensors(specs: Specs, seed: int) -> dict[str, Tensor]:
    """Parts of random bytes and parameters of random numbers, all of them finite."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in specs.items():
        if spec.dtype.itemsize > 1:
            tensors[name] = torch.rand(spec.shape, generator=generator).add(0.5).to(spec.dtype)
            continue
        least, most = (
            (0, 127) if name.endswith(CODES) or "float8" in str(spec.dtype) else (118, 134)
        )
        if name.endswith("zeros"):
            least, most = 0, 16
        values = torch.randint(least, most, spec.shape, generator=generator, dtype=torch.uint8)
        tensors[name] = values.view(spec.dtype)
    return tensors


def are_same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        some[name].shape == other.shape
        and torch.equal(
            some[name].contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
        )
        for name, other in others.items()
    )


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """No GPU; yields the addresses of what is pinned."""
    with fake_pinning(monkeypatch) as addresses:
        yield addresses


def block_of(store: RandomStore) -> ExpertBlock:
    return ExpertBlock(store.specs(0), coding=store.coding(0))


def tier_of(store: RandomStore) -> PinnedExperts:
    blocks = [block_of(store)] * 2
    return PinnedExperts(store, [EXPERTS] * 2, blocks, CPU, packs=True, transposed=False)


# ---------------------------------------------------------------------- blocks

ENCODINGS = st.one_of(
    st.none(),
    st.just(MXFP4()),
    st.builds(FP8Block, rows=st.sampled_from([1, 2]), columns=st.integers(1, 90)),
    st.builds(Int4Group, columns=st.sampled_from([2, 16]), zeros=st.booleans()),
    st.builds(NVFP4, rows=st.just(2), divides=st.booleans()),
)


@given(ENCODINGS, ENCODINGS, st.integers(1, 40), st.integers(1, 4), st.booleans())
def test_parts_lie_in_a_block_in_their_order_and_never_overlap(
    first: Encoding | None, second: Encoding | None, rows: int, columns: int, has_bias: bool
) -> None:
    shape = 2 * rows, 32 * columns
    specs = {"a": Spec(shape, BF16), "b": Spec(shape, BF16)}
    specs |= {"c": Spec((3,), BF16)} if has_bias else {}
    encodings = {"a": first, "b": second}
    coding = {name: CodedMatrix(one, shape, False) for name, one in encodings.items() if one}
    block = ExpertBlock(specs, coding=coding)
    end = 0
    for field in block.stored_fields.values():
        assert field.start % ALIGNMENT == 0
        assert end <= field.start < end + (ALIGNMENT if coding else CHUNK)
        end = field.start + field.units
    assert end <= block.stored_units
    assert block.stored_units % CHUNK == 0
    assert block.units == ExpertBlock(specs).units == block.plain.stored_units
    assert block.is_plain == (not coding)
    assert not (coding and block.can_pack)
    assert block.packed(0).stored_fields == block.stored_fields
    units = torch.zeros(2, block.stored_units, dtype=torch.int16)
    for number, view in enumerate(block.stored_views(units).values()):
        view.view(torch.uint8).fill_(number + 1)
    for number, view in enumerate(block.stored_views(units[1]).values()):
        assert (view.view(torch.uint8) == number + 1).all()
    if coding:
        assert "c" not in specs or block.start_stored("c") == block.stored_fields["c"].start


def test_blocks_in_codes_are_never_packed() -> None:
    coding = {"a": CodedMatrix(MXFP4(), (32, 32), False)}
    with pytest.raises(AssertionError, match="packed or in codes"):
        ExpertBlock({"a": Spec((32, 32), BF16)}, 16, coding)


@cases
def test_blocks_are_decoded_to_the_weights_of_their_encodings(name: str) -> None:
    """By kernels, or where these cannot by torch; what is not in codes is copied."""
    store = RandomStore(CASES[name])
    block = block_of(store)
    is_odd = store.case.transposed or name == "int4 in odd groups"
    assert kernels_decode(block) == (not is_odd)
    stored_EN = torch.zeros(EXPERTS, block.stored_units, dtype=torch.int16)
    for expert in range(EXPERTS):
        store.read_stored(0, expert, block.stored_views(stored_EN[expert]))
    to_RN = torch.zeros(3, block.units, dtype=torch.int16)
    unpack_blocks(block, stored_EN, torch.tensor([2, 0], dtype=torch.int32), to_RN)
    for row, expert in enumerate((2, 0)):
        assert are_same(block.views(to_RN[row]), store.weights(0, expert))
    assert not to_RN[2].any()


# ---------------------------------------------------------------------- pinned memory


@cases
def test_pinned_experts_are_the_stores_codes_and_are_read_decoded(
    name: str, pinned: set[int]
) -> None:
    store = RandomStore(CASES[name])
    tier = tier_of(store)
    block = block_of(store)
    assert pinned == {layer.data_ptr() for layer in tier.layers}
    assert not tier.packed
    for layer in range(2):
        assert tier.link_bytes(layer) == 2 * block.stored_units
        for expert in range(EXPERTS):
            stored = block.stored_views(tier.layers[layer][expert])
            assert are_same(stored, store.stored[layer][expert])
    assert are_same(tier.read(1, 2), store.weights(1, 2))
    tier.close()
    assert not pinned


def test_transposed_experts_are_handed_out_as_the_model_has_them() -> None:
    store = RandomStore(CASES["mxfp4 transposed"])
    specs = {name: Spec(spec.shape[::-1], spec.dtype) for name, spec in store.specs(0).items()}
    turned = {name: one._replace(transposed=False) for name, one in store.coding(0).items()}
    blocks = [ExpertBlock(specs, coding=turned)] * 2
    tier = PinnedExperts(store, [EXPERTS] * 2, blocks, CPU, packs=True, transposed=True)
    assert kernels_decode(blocks[0])
    assert are_same(tier.read(1, 3), store.weights(1, 3))


@pytest.mark.parametrize("broken", [(0, 0), (0, EXPERTS - 1), (1, 1)])
def test_a_store_that_cannot_be_read_leaves_nothing_pinned(
    broken: tuple[int, int], pinned: set[int]
) -> None:
    store = RandomStore(CASES["mxfp4"])
    store.broken = broken
    with pytest.raises(ValueError, match="the file ends here"):
        tier_of(store)
    assert not pinned


def test_memory_that_cannot_be_pinned_leaves_nothing_pinned(
    pinned: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    register = PinnedMemory.register

    def full(memory: PinnedMemory, tensor: Tensor) -> None:
        if pinned:
            raise MemoryError("no more")
        register(memory, tensor)

    monkeypatch.setattr(PinnedMemory, "register", full)
    with pytest.raises(MemoryError, match="no more"):
        tier_of(RandomStore(CASES["fp8 rows"]))
    assert not pinned


@pytest.mark.parametrize("shape", [(3, 5), (0, 8), (2, 1 << 20)])
def test_untouched_memory_is_zero_and_can_be_written(shape: tuple[int, ...]) -> None:
    tensor = untouched(shape, torch.int16)
    assert tensor.shape == shape
    assert not tensor.any()
    tensor.fill_(7)
    assert (tensor == 7).all()


# ---------------------------------------------------------------------- decoding on arrival


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4 transposed", "int4 in odd groups", "down alone"])
def test_experts_without_a_kernel_arrive_in_codes_and_are_served_decoded(name: str) -> None:
    store = RandomStore(CASES[name])
    tier, block = tier_of(store), block_of(store)
    layers: Any = [SimpleNamespace(num_experts=EXPERTS, name=f"layer {i}") for i in range(2)]
    stats = Stats(layers=layers, num_slots=3, policy="lru")
    pool = StreamingPool(block, 3, CPU, tier, LRU(2, EXPERTS), stats)
    assert pool.slots_SN.shape == (3, block.units)
    for layer, experts in ((0, [0, 1, 2, 3]), (1, [1, 3]), (0, [2, 3])):
        served = set()
        for expert, parameters in pool.serve(layer, experts):
            assert are_same(parameters, store.weights(layer, expert))
            served.add(expert)
        assert served == set(experts)
    pool.cache.check_integrity()
    assert stats.bytes_loaded == stats.misses * 2 * block.stored_units
    pool.close()


def test_the_time_of_a_load_holds_its_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RandomStore(CASES["int4 in odd groups"])
    layers: Any = [SimpleNamespace(num_experts=EXPERTS, name=f"layer {i}") for i in range(2)]
    stats = Stats(layers=layers, num_slots=3, policy="lru")
    pool = StreamingPool(block_of(store), 3, CPU, tier_of(store), LRU(2, EXPERTS), stats)
    decoded: list[Tensor] = []
    monkeypatch.setattr(Landing, "decode", lambda self, slot_N: decoded.append(slot_N))
    assert pool.seconds_per_load() > 0
    assert len(decoded) == PROBES
    assert all(len(slot_N) == block_of(store).units for slot_N in decoded)
