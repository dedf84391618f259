"""runtime.prepare: the same model in contiguous blocks, or a clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import runtime
from routing.process.output_lock import OutputLock
from runtime.plan import plan
from runtime.prepare import PrepareSettings, main, prepare
from runtime.weights.prepared.checksums import verify
from runtime.weights.prepared.manifest import PAGE, read_manifest
from tests.helpers.architectures import architecture_model, is_known
from tests.helpers.compatibility import logits
from tests.helpers.tiny import KINDS, save_tiny

ODD = ["aria", "dbrx", "ernie4_5_vl_moe", "inkling2_text", "jetmoe", "longcat_flash", "nllb-moe"]


@pytest.mark.parametrize("kind", [*KINDS, *ODD])
def test_a_prepared_model_is_exact(kind: str, tmp_path: Path) -> None:
    if not is_known(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    architecture_model(kind).save_pretrained(tmp_path / "hub", max_shard_size="80KB")  # type: ignore[operator]
    prepare(tmp_path / "hub", tmp_path / "prepared")
    theirs, ours = (runtime.load(tmp_path / name, memory=0.5) for name in ("hub", "prepared"))
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.expertflow.topology == theirs.expertflow.topology


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "hub", "olmoe")
    return prepare(tmp_path / "hub", tmp_path / "prepared")


def test_a_prepared_model_can_be_detached_complete(prepared: Path) -> None:
    model: Any = runtime.load(prepared).expertflow.detach()
    stock: Any = AutoModelForCausalLM.from_pretrained(prepared.parent / "hub")
    theirs = stock.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert len(model.state_dict()) == len(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_can_be_chosen(dtype: torch.dtype, prepared: Path) -> None:
    ours, theirs = (
        runtime.load(path, dtype=dtype, memory=0.5) for path in (prepared, prepared.parent / "hub")
    )
    assert torch.equal(logits(ours), logits(theirs)) and logits(ours).dtype == dtype


def test_every_expert_begins_on_a_page_and_is_contiguous(prepared: Path) -> None:
    layers = read_manifest(prepared).layers
    starts = [layer.offset(expert) for layer in layers for expert in range(8)]
    assert len(layers) == 4 and len(set(starts)) == 32
    assert all(start % PAGE == 0 for start in starts)
    stock: Any = AutoModelForCausalLM.from_pretrained(prepared.parent / "hub")
    blocks = (prepared / "experts.bin").read_bytes()
    for layer, decoder in zip(layers, stock.model.layers, strict=True):
        experts = decoder.mlp.experts
        assert list(layer.parameters) == ["gate_up_proj", "down_proj"]
        for expert in range(8):
            both = [experts.gate_up_proj[expert].flatten(), experts.down_proj[expert].flatten()]
            expected = torch.cat(both).detach().numpy().tobytes()
            assert blocks[layer.offset(expert) :].startswith(expected)


def test_the_tokenizer_is_copied_and_no_weights_are_stored_twice(prepared: Path) -> None:
    names = {path.name for path in prepared.iterdir()}
    assert {"config.json", "tokenizer.json", "experts.bin", "experts.json"} <= names
    assert [name for name in names if name.endswith(".safetensors")] == [
        "model.resident.safetensors"
    ]
    hub = sum(path.stat().st_size for path in prepared.parent.joinpath("hub").iterdir())
    assert sum(path.stat().st_size for path in prepared.iterdir()) < hub + 32 * PAGE + 10_000


def test_transformers_refuses_it_instead_of_making_up_experts(prepared: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(prepared)


def test_a_prepared_model_is_planned_like_its_checkpoint(prepared: Path) -> None:
    ours, theirs = plan(prepared, 0.5), plan(prepared.parent / "hub", 0.5)
    assert ours.resident_bytes == theirs.resident_bytes
    assert ours.cache_bytes == theirs.cache_bytes


# ---------------------------------------------------------------------- damage


def test_an_interrupted_preparation_leaves_nothing_that_looks_like_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "hub", "olmoe")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("runtime.weights.prepared.blocks_file._write_layer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "hub", tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
    prepare(tmp_path / "hub", tmp_path / "prepared")
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "prepared"}


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_a_damaged_block_is_found_by_its_checksum_and_its_expert_named(prepared: Path) -> None:
    assert verify(prepared) == 32
    layer = read_manifest(prepared).layers[2]
    flip(prepared / "experts.bin", layer.offset(5) + 17)
    with pytest.raises(ValueError, match=f"expert 5 of {layer.name} is damaged"):
        verify(prepared)


def test_truncated_blocks_are_refused_at_load(prepared: Path) -> None:
    path = prepared / "experts.bin"
    os.truncate(path, path.stat().st_size - PAGE)
    with pytest.raises(ValueError, match=r"experts\.bin has .* bytes instead of"):
        runtime.load(prepared)


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 99), lambda path: flip(path, 9)])
def test_blocks_changed_under_a_running_model_are_noticed(
    change: Callable[[Path], None], prepared: Path
) -> None:
    model: Any = runtime.load(prepared, memory=0.25)
    logits(model)
    change(prepared / "experts.bin")
    with pytest.raises(ValueError, match=r"experts\.bin was changed while the model was running"):
        logits(model)


@pytest.mark.parametrize("name", ["experts.bin", "model.resident.safetensors"])
def test_a_missing_file_is_refused_by_name(name: str, prepared: Path) -> None:
    (prepared / name).unlink()
    with pytest.raises(ValueError, match=name):
        runtime.load(prepared)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema": 4, "layers": []}',
        '{"schema": 1, "layers": []}',
        '{"schema": 1}',
    ],
)
def test_a_file_that_is_no_manifest_is_refused(text: str, prepared: Path) -> None:
    (prepared / "experts.json").write_text(text)
    with pytest.raises(ValueError, match=r"experts\.json is not a manifest of experts"):
        runtime.load(prepared)


@pytest.mark.parametrize("change", ["names", "shapes", "number"])
def test_blocks_of_another_model_are_refused(change: str, prepared: Path) -> None:
    path = prepared / "experts.json"
    manifest = json.loads(path.read_text())
    layer = manifest["layers"][1]
    if change == "names":
        layer["name"] = "elsewhere"
    elif change == "shapes":
        layer["parameters"]["down_proj"][1] = [32, 23]
    else:
        layer["checksums"].pop()
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="of another model than its config"):
        runtime.load(prepared)


# ---------------------------------------------------------------------- the command


def test_two_preparations_cannot_write_one_directory(prepared: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "out.partial"
    unfinished.mkdir()
    (unfinished / "blocks").write_text("of the other process")
    with OutputLock(tmp_path / "out"), pytest.raises(ValueError, match="is being written by"):
        prepare(prepared.parent / "hub", tmp_path / "out")
    assert (unfinished / "blocks").exists()


def test_preparing_onto_an_existing_path_or_twice_is_refused(prepared: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        prepare(prepared.parent / "hub", prepared)
    with pytest.raises(ValueError, match="is a prepared model already"):
        prepare(prepared, prepared.parent / "again")


def test_the_command_prepares_and_verifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "hub", "olmoe")
    main(PrepareSettings(model=str(tmp_path / "hub"), out=str(tmp_path / "out")))
    main(PrepareSettings(model=str(tmp_path / "out"), verify=True))
    assert "out: 32 experts are intact" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"runtime\.prepare MODEL OUT"):
        main(PrepareSettings(model=str(tmp_path / "hub")))
