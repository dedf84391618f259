"""Prepared models with packed experts: the same weights in three quarters of the bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.plan import plan
from runtime.prepare import PrepareSettings, main, prepare
from runtime.weights.packed.packing import PATCHES
from runtime.weights.prepared.checksums import verify
from runtime.weights.prepared.manifest import PAGE, read_manifest
from runtime.weights.source import Source, from_path
from tests.helpers.architectures import architecture_model
from tests.helpers.compatibility import logits
from tests.helpers.tiny import save_tiny, tiny_model


def save(directory: Path, odd: int = 0, model_type: str = "olmoe") -> Path:
    """A model of bfloat16 weights, `odd` of which share no exponent with the others."""
    model: Any = tiny_model(model_type).bfloat16()
    with torch.no_grad():
        model.model.layers[-1].mlp.experts.down_proj[-1].view(-1)[:odd] = 1e-30
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return prepare(save(tmp_path / "hub"), tmp_path / "packed", packed=True)


def experts(source: Source, layer: int, expert: int, *, stored: bool) -> dict[str, torch.Tensor]:
    specs = source.store.specs(layer)
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    read = source.store.read_stored if stored else source.store.read
    read(layer, expert, into)
    return into


@pytest.mark.parametrize("odd", [0, 5, 40])
@pytest.mark.parametrize("stored", [False, True])
def test_every_expert_is_that_of_the_checkpoint(odd: int, stored: bool, tmp_path: Path) -> None:
    prepare(save(tmp_path / "hub", odd), tmp_path / "packed", packed=True)
    ours, theirs = (from_path(tmp_path / name, None, "auto") for name in ("packed", "hub"))
    blocks = read_manifest(tmp_path / "packed").layers
    assert {layer.packed.layout.patches for layer in blocks if layer.packed} == {
        PATCHES[odd >= PATCHES[0]]
    }
    for layer in range(len(ours.layers)):
        assert ours.store.coding(layer) == {}
        for expert in range(ours.layers[layer].num_experts):
            one, other = (experts(s, layer, expert, stored=stored) for s in (ours, theirs))
            assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_a_transposed_layout_is_packed_by_the_rows_that_kernels_read(tmp_path: Path) -> None:
    model: Any = architecture_model("gpt_oss").bfloat16()
    model.save_pretrained(tmp_path / "hub")
    prepare(tmp_path / "hub", tmp_path / "packed", packed=True)
    ours, theirs = (from_path(tmp_path / name, None, "auto") for name in ("packed", "hub"))
    blocks = ours.store.packed(0)
    assert blocks is not None and blocks.transposed
    name = "down_proj"
    assert blocks.layout.fields[name].shape == ours.store.specs(0)[name].shape[::-1]
    one, other = (experts(source, 0, 1, stored=False) for source in (ours, theirs))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("host", ["file", "memory"])
def test_the_model_computes_the_same(host: str, packed: Path) -> None:
    ours = runtime.load(packed, memory=0.5, host=host)
    assert torch.equal(logits(ours), logits(runtime.load(packed.parent / "hub", memory=0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dtype_can_be_chosen(dtype: torch.dtype, packed: Path) -> None:
    ours, theirs = (runtime.load(p, dtype=dtype) for p in (packed, packed.parent / "hub"))
    assert torch.equal(logits(ours), logits(theirs))


def test_it_is_planned_like_its_checkpoint(packed: Path) -> None:
    ours, theirs = plan(packed, 0.5), plan(packed.parent / "hub", 0.5)
    assert ours.resident_bytes == theirs.resident_bytes
    assert ours.total_expert_bytes == theirs.total_expert_bytes


def test_every_block_begins_on_a_page(packed: Path) -> None:
    for layer in read_manifest(packed).layers:
        for expert in range(len(layer.checksums)):
            assert layer.offset(expert) % PAGE == 0
    assert json.loads((packed / "experts.json").read_text())["schema"] == 3
    assert (packed / "experts.bin").stat().st_size % PAGE == 0


# ---------------------------------------------------------------------- damage


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_damaged_block_is_found_when_it_is_verified_or_held_in_memory(packed: Path) -> None:
    layer = read_manifest(packed).layers[1]
    assert verify(packed) == 32
    flip(packed / "experts.bin", layer.offset(5) + layer.block_bytes - 1)
    message = rf"experts\.bin: expert 5 of {layer.name} is damaged"
    with pytest.raises(ValueError, match=message):
        verify(packed)
    with pytest.raises(ValueError, match=message):
        runtime.load(packed, host="memory")


@pytest.mark.parametrize(
    ("turned", "message"), [(True, "checksum is of other contents"), ([1], "transposed or not")]
)
def test_a_manifest_that_was_changed_is_refused(turned: Any, message: str, packed: Path) -> None:
    path = packed / "experts.json"
    manifest = json.loads(path.read_text())
    manifest["layers"][1]["packing"]["transposed"] = turned
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"experts\.json is not .*{message}"):
        runtime.load(packed)


def test_a_manifest_of_the_versions_that_wrote_no_checksum_is_read(packed: Path) -> None:
    path, layers = packed / "experts.json", read_manifest(packed).layers
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    assert read_manifest(packed).layers == layers


def test_plain_blocks_are_compared_too_when_they_are_held_in_memory(tmp_path: Path) -> None:
    save_tiny(tmp_path / "hub", "olmoe")
    prepared = prepare(tmp_path / "hub", tmp_path / "prepared")
    layer = read_manifest(prepared).layers[3]
    flip(prepared / "experts.bin", layer.offset(2))
    with pytest.raises(ValueError, match=f"expert 2 of {layer.name} is damaged"):
        runtime.load(prepared, host="memory")


@pytest.mark.parametrize("place", range(0, 40_000, 6_007))
def test_a_damaged_block_never_writes_beyond_its_expert(place: int, packed: Path) -> None:
    """A miss is not compared with its checksum: its weights are wrong then, and nothing else."""
    layer = read_manifest(packed).layers[0]
    data = bytearray((packed / "experts.bin").read_bytes())
    at = layer.offset(0) + place % layer.block_bytes
    data[at : at + 64] = b"\xff" * 64
    (packed / "experts.bin").write_bytes(data)
    source = from_path(packed, None, "auto")
    experts(source, 0, 0, stored=False)


def test_truncated_blocks_are_refused(packed: Path) -> None:
    path = packed / "experts.bin"
    os.truncate(path, path.stat().st_size - 2 * PAGE)
    with pytest.raises(ValueError, match=r"experts\.bin has .* bytes instead of"):
        runtime.load(packed)


@pytest.mark.parametrize(
    "change",
    [
        lambda packing: packing.update(patches=17),
        lambda packing: packing.update(patches="16"),
        lambda packing: packing.update(chunk=4096),
        lambda packing: packing.pop("transposed"),
    ],
)
def test_another_way_of_packing_is_refused(
    change: Callable[[dict[str, Any]], Any], packed: Path
) -> None:
    path = packed / "experts.json"
    manifest = json.loads(path.read_text())
    change(manifest["layers"][2]["packing"])
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"experts\.json is not a manifest of experts"):
        runtime.load(packed)


# ---------------------------------------------------------------------- refusals


def test_experts_that_cannot_be_packed_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    save(tmp_path / "odd", 200)
    save_tiny(tmp_path / "float32", "olmoe")
    tiny: Any = architecture_model("switch_transformers").bfloat16()
    tiny.save_pretrained(tmp_path / "modules")
    for name, message in {
        "odd": r"experts, expert 7, have too many different exponents",
        "float32": r"experts of torch\.float32.* only bfloat16 weights",
        "modules": r"a module for each expert",
    }.items():
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / name, tmp_path / "out", packed=True)
        assert not (tmp_path / "out").exists()


def test_the_command_packs_and_says_what_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, out = str(save(tmp_path / "hub")), str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"--packed is for plain weights"):
        main(PrepareSettings(model=hub, out=out, packed=True, encoding="int4"))
    with pytest.raises(ValueError, match=r"packed= is for plain weights"):
        prepare(hub, out, packed=True, encoding="int4")
    main(PrepareSettings(model=hub, out=out, packed=True))
    main(PrepareSettings(model=out, verify=True))
    assert "out: 32 experts are intact" in capsys.readouterr().out
