"""Checkpoints whose files contradict each other are refused by name; none is ever mapped."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import runtime
from runtime.prepare import prepare
from tests.helpers.tiny import save_tiny, tiny_model

SHARED = "model.layers.0.self_attn.q_proj.weight"


def refused(directory: Path) -> str:
    with pytest.raises(ValueError, match=str(directory)) as caught:
        runtime.load(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("olmoe").save_pretrained(tmp_path, max_shard_size="60KB")  # type: ignore[operator]
    return tmp_path


def test_two_sets_of_weights_are_refused(sharded: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded / "model.safetensors")
    assert "has two sets of weights: model.safetensors, and the shards of" in refused(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in index.values() if file != index[SHARED])
    tensors = load_file(sharded / other)
    save_file(tensors | {SHARED: torch.zeros(32, 32)}, sharded / other, {"format": "pt"})
    assert f"has {SHARED} twice: in " in refused(sharded)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd"])
def test_an_index_that_leaves_its_directory_is_refused(file: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    assert f"names {file}, which lies outside of the directory" in refused(sharded)


def test_a_name_that_is_in_a_file_of_json_twice_is_refused(sharded: Path) -> None:
    text = '{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "x is in it twice" in refused(sharded)


def with_header(path: Path, header: dict[str, Any], size: int) -> None:
    data = json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(size))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, "12 bytes instead of 16"),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}}, "cut in x"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
          "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "y overlaps"),
        ({"x": {"dtype": "F32"}}, "data_offsets"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_refused(
    header: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    with_header(directory / "model.safetensors", header, 16)
    message = refused(directory)
    assert "model.safetensors is missing or damaged" in message and reason in message


def test_a_pointer_of_git_lfs_is_told_apart(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a pointer of Git LFS instead of the file: git lfs pull" in refused(directory)


def test_other_weights_stored_as_codes_are_refused(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "olmoe") / "model.safetensors"
    tensors = load_file(path)
    tensors[SHARED] = tensors[SHARED].to(torch.int8)
    save_file(tensors, path, {"format": "pt"})
    assert f"{SHARED} is stored as I8: quantised" in refused(tmp_path)


def test_no_file_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping of more than the memory fails where memory is not overcommitted."""
    directory = save_tiny(tmp_path / "hub", "gpt_oss")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a file was mapped")

    for module, name in ((safetensors, "safe_open"), (mmap, "mmap")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    runtime.load(directory)
    runtime.load(prepare(directory, tmp_path / "prepared"))


def test_more_layers_than_the_configuration_describes_are_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    assert "has weights of model.layers.3, but config.json describes fewer" in refused(directory)


def test_a_layer_with_tensors_of_its_own_is_ignored(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "olmoe") / "model.safetensors"
    extra = {"model.layers.4.eh_proj.weight": torch.zeros(2), "model.layers.4.mlp.gate.weight":
             torch.zeros(8, 32)}  # fmt: skip
    save_file(load_file(path) | extra, path, {"format": "pt"})
    runtime.load(tmp_path)


def test_experts_of_one_layer_in_two_number_formats_are_refused(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "olmoe") / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].half()
    save_file(tensors, path, {"format": "pt"})
    assert f"{name} as F16: its files are mixed" in refused(tmp_path)
