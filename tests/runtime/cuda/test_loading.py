"""Experts on their way to pinned memory: read as they are, or packed on the way, the same bytes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.memory import layer_packer
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.layer_packer import LayerPacker
from runtime.cuda.memory.pinned import PinnedMemory
from runtime.prepare import prepare
from runtime.weights.arena import Spec
from runtime.weights.packed import block_layout
from runtime.weights.packed.packed_blocks import PackedBlocks
from runtime.weights.prepared.manifest import read_manifest
from runtime.weights.prepared.store import PreparedStore
from runtime.weights.store import ExpertStore, ModuleStore
from tests.helpers.architectures import architecture_model
from tests.helpers.fake_cuda import fake_pinning, load_fake
from tests.helpers.tiny import tiny_model


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """No GPU; yields the addresses of what is pinned."""
    with fake_pinning(monkeypatch) as addresses:
        yield addresses


def save(directory: Path, odd: int = 0) -> Path:
    """A model of bfloat16 weights, `odd` of which share no exponent with the others."""
    model: Any = tiny_model("olmoe").bfloat16()
    with torch.no_grad():
        model.model.layers[-1].mlp.experts.down_proj[-1].view(-1)[:odd] = 1e-30
    model.save_pretrained(directory)
    return directory


def tier_of(path: Path) -> Any:
    return load_fake(path).expertflow._backend._host


def are_same(some: Any, others: Any) -> bool:
    return len(some.layers) == len(others.layers) and all(
        torch.equal(one, other) for one, other in zip(some.layers, others.layers, strict=True)
    )


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this should not have been called")


@pytest.mark.parametrize(("odd", "patches"), [(0, 16), (40, 64)])
def test_packed_experts_are_read_into_place_and_nothing_is_packed(
    odd: int, patches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = prepare(save(tmp_path / "hub", odd), tmp_path / "packed", packed=True)
    want = tier_of(tmp_path / "hub")
    assert want.expert_blocks[0].patches == patches
    monkeypatch.setattr(block_layout, "pack", never)
    for name in ("read", "read_stored"):
        monkeypatch.setattr(PreparedStore, name, never)
    ours = tier_of(packed)
    assert ours.packed and are_same(ours, want)


def test_a_transposed_model_is_loaded_packed(tmp_path: Path) -> None:
    model: Any = architecture_model("gpt_oss").bfloat16()
    model.save_pretrained(tmp_path / "hub")
    packed = prepare(tmp_path / "hub", tmp_path / "packed", packed=True)
    assert are_same(tier_of(packed), tier_of(tmp_path / "hub"))


def test_blocks_of_another_orientation_are_unpacked_and_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = prepare(save(tmp_path / "hub"), tmp_path / "packed", packed=True)
    want = tier_of(tmp_path / "hub")

    def turned(store: PreparedStore, layer: int) -> PackedBlocks:
        return PackedBlocks.of(store.specs(layer), 16, transposed=True)

    monkeypatch.setattr(PreparedStore, "packed", turned)
    assert are_same(tier_of(packed), want)


def test_tokens_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    packed = prepare(save(tmp_path / "hub"), tmp_path / "packed", packed=True)
    ids_BT = torch.randint(2, 256, (1, 7), generator=torch.Generator().manual_seed(3))
    ours, theirs = (
        load_fake(path)(ids_BT).logits for path in (packed, tmp_path / "hub")
    )  # fmt: skip
    assert torch.equal(ours, theirs)


def test_advice_to_pack_is_given_for_prepared_models_that_were_packed_while_loading(
    tmp_path: Path,
) -> None:
    hub = save(tmp_path / "hub")
    prepared = prepare(hub, tmp_path / "prepared")
    packed = prepare(hub, tmp_path / "packed", packed=True)
    with pytest.warns(UserWarning, match=r"prepared holds its experts unpacked.*--packed"):
        load_fake(prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_fake(hub)
        load_fake(packed)


def test_advice_is_not_given_where_weights_do_not_pack(tmp_path: Path) -> None:
    prepared = prepare(save(tmp_path / "hub", 200), tmp_path / "prepared")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tier = tier_of(prepared)
    assert not tier.packed


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize("packs", [True, False])
def test_a_damaged_block_is_found_while_it_is_loaded_and_nothing_stays_pinned(
    packs: bool, tmp_path: Path, pinned: set[int]
) -> None:
    prepared = prepare(save(tmp_path / "hub"), tmp_path / "prepared", packed=packs)
    layer = read_manifest(prepared).layers[2]
    data = bytearray((prepared / "experts.bin").read_bytes())
    data[layer.offset(6) + 40] ^= 4
    (prepared / "experts.bin").write_bytes(data)
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match=f"expert 6 of {layer.name} is damaged; prepare"):
        load_fake(prepared)
    assert not pinned
    began = set(threading.enumerate()) - before
    assert not [one for one in began if one.name.startswith("expertflow-")]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("packs", [True, False])
def test_memory_that_cannot_be_pinned_leaves_nothing_pinned(
    fails_at: int, packs: bool, tmp_path: Path, pinned: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(save(tmp_path / "hub"), tmp_path / "prepared", packed=packs)
    register = PinnedMemory.register

    def full(memory: PinnedMemory, tensor: Tensor) -> None:
        if len(pinned) >= fails_at:
            raise MemoryError("no more")
        register(memory, tensor)

    monkeypatch.setattr(PinnedMemory, "register", full)
    with pytest.raises(MemoryError, match="no more"):
        load_fake(prepared)
    assert not pinned


# ---------------------------------------------------------------------- packing while others read


def test_experts_are_read_ahead_of_their_packing_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("olmoe").bfloat16()
    want = {name: parameter.clone() for name, parameter in model.named_parameters()}
    read = ModuleStore.read
    keys: list[tuple[int, int]] = []

    def log(store: ModuleStore, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        keys.append((layer, expert))
        read(store, layer, expert, into)

    monkeypatch.setattr(ModuleStore, "read", log)
    monkeypatch.setattr(layer_packer, "MOST_PADS", 3)
    engine = load_fake(model).expertflow
    assert keys == sorted(keys) == [(layer, e) for layer in range(4) for e in range(8)]
    engine.detach()
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())


SPECS = {"down_proj": Spec((8, 16), torch.bfloat16)}


class Numbered(ExpertStore):
    """Experts filled with their numbers."""

    def specs(self, layer: int) -> Any:
        return SPECS

    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        into["down_proj"].fill_(layer * 10 + expert)

    whole_specs = specs
    restore = never


def test_pads_are_not_written_before_they_have_been_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two pads, each block that comes out is its own expert's."""
    monkeypatch.setattr(layer_packer, "MOST_PADS", 2)
    with ThreadPoolExecutor(4) as threads:
        packer = LayerPacker(
            Numbered(), ExpertBlock(SPECS), [5, 5], torch.device("cpu"), PinnedMemory(), threads,
            lambda _: None, transposed=False,
        )  # fmt: skip
        for layer in (0, 1, 0):
            blocks = [
                block_N[:128].view(torch.bfloat16).clone() for block_N in packer.blocks(layer)
            ]
            assert [one.unique().tolist() for one in blocks] == [[layer * 10 + e] for e in range(5)]
        next(packer.blocks(0))
        packer.close()
