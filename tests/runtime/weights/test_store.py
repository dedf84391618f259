"""The host tier: one contract for every store, and the errors of a damaged checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import runtime
from routing.layers import MoELayer, find_moe_layers
from runtime.weights.files import read_header
from runtime.weights.source import from_module, from_path
from runtime.weights.store import ExpertStore, ModuleStore, expert_parameters, expert_part
from tests.helpers.tiny import KINDS, save_tiny, tiny_model

FUSED = [kind for kind in KINDS if kind != "switch_transformers"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "as on the hub": {},
    "as on the hub, in shards": {"max_shard_size": "60KB"},
    "fused": {"save_original_format": False},
    "fused, in shards": {"save_original_format": False, "max_shard_size": "60KB"},
}
CASES = [(kind, "in memory") for kind in KINDS] + [
    (kind, layout) for kind in KINDS for layout in LAYOUTS
]
DTYPES = [torch.float32, torch.bfloat16]


class Opened(NamedTuple):
    """A store with the containers it serves, and the stock model's layers."""

    store: ExpertStore
    layers: list[MoELayer]
    stock: list[MoELayer]


Open = Callable[[str, str, torch.dtype], Opened]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`saved(kind, layout)`: a checkpoint directory, made once."""
    made: dict[tuple[str, str], Path] = {}

    def directory(kind: str, layout: str) -> Path:
        if (kind, layout) not in made:
            path = made[kind, layout] = tmp_path_factory.mktemp("checkpoint")
            tiny_model(kind).save_pretrained(path, **LAYOUTS[layout])  # type: ignore[operator]
            assert len(list(path.glob("*.safetensors"))) > 1 or "in shards" not in layout
        return made[kind, layout]

    return directory


@pytest.fixture
def opened(saved: Callable[[str, str], Path]) -> Open:
    def open_store(kind: str, layout: str, dtype: torch.dtype) -> Opened:
        if layout == "in memory":
            source = from_module(tiny_model(kind).to(dtype), None)
            stock = find_moe_layers(tiny_model(kind).to(dtype))
        else:
            directory = saved(kind, layout)
            source = from_path(directory, None, dtype)
            stock = find_moe_layers(type(source.model).from_pretrained(directory, dtype=dtype))  # type: ignore[attr-defined]
        return Opened(source.store, source.layers, stock)

    return open_store


def expert_of(layer: MoELayer, expert: int) -> dict[str, Tensor]:
    """The stock model's parameters of one expert."""
    names = layer.container.names(layer.module)
    return expert_part(layer, names, expert_parameters(layer), expert)


# ---------------------------------------------------------------------- the contract


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_every_expert_is_bit_equal_to_the_stock_models(
    opened: Open, kind: str, layout: str, dtype: torch.dtype
) -> None:
    store, _, stock = opened(kind, layout, dtype)
    for index, layer in enumerate(stock):
        for expert in range(layer.num_experts):
            into = {
                name: torch.full(spec.shape, torch.nan, dtype=spec.dtype)
                for name, spec in store.specs(index).items()
            }
            store.read(index, expert, into)
            expected = expert_of(layer, expert)
            assert into.keys() == expected.keys()
            for name, tensor in expected.items():
                assert tensor.dtype == into[name].dtype and torch.equal(tensor, into[name])


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_restored_container_equals_the_stock_models(opened: Open, kind: str, layout: str) -> None:
    store, layers, stock = opened(kind, layout, torch.float32)
    for index, (layer, original) in enumerate(zip(layers, stock, strict=True)):
        store.take(index)
        assert not [p for p in layer.module.parameters() if p.numel()], "nothing stays behind"
        store.restore(index)
        ours, theirs = layer.module.state_dict(), original.module.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        wanted = [p.requires_grad for p in original.module.parameters()]
        assert [p.requires_grad for p in layer.module.parameters()] == wanted


def test_a_module_gets_back_the_very_parameters_that_were_taken() -> None:
    model = tiny_model("olmoe")
    before = dict(model.named_parameters())
    layers = find_moe_layers(model)
    store = ModuleStore(layers)
    for index in range(len(layers)):
        store.take(index)
    assert not any("experts" in name for name, _ in model.named_parameters())
    for index in range(len(layers)):
        store.restore(index)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_from_a_directory_never_holds_its_experts(
    saved: Callable[[str, str], Path], layout: str
) -> None:
    source = from_path(saved("olmoe", layout), None, "auto")
    held = sum(p.numel() * p.element_size() for p in source.model.parameters())
    assert held == source.fixed_bytes
    assert not any("experts" in name for name, _ in source.model.named_parameters())


def test_modeling_classes_are_the_librarys_own_after_a_load(tiny_directory: Any) -> None:
    from transformers.models.olmoe import modeling_olmoe

    before = modeling_olmoe.OlmoeExperts
    source = from_path(tiny_directory("olmoe"), None, "auto")
    assert modeling_olmoe.OlmoeExperts is before
    assert all(type(layer.module) is before for layer in source.layers)


# ---------------------------------------------------------------------- damaged checkpoints


def refused(directory: Path) -> str:
    """The message of the ValueError with which `load` refuses a directory."""
    with pytest.raises(ValueError, match=str(directory)) as caught:
        runtime.load(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a safetensors file after `edit` changed its tensors."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


EXPERT = {
    "olmoe": "model.layers.1.mlp.experts.3.up_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "qwen3_moe": "model.layers.2.mlp.experts.3.down_proj.weight",
    "switch_transformers": "decoder.block.1.layer.2.mlp.experts.expert_3.wo.weight",
}
ATTENTION = "model.layers.0.self_attn.q_proj.weight"
WHOLE = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_expert_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, kind)
    change(directory / "model.safetensors", lambda tensors: tensors.pop(EXPERT[kind]))
    assert EXPERT[kind] in refused(directory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shorter", ["rows", "columns"])
def test_an_expert_of_another_shape_is_refused_by_name(
    kind: str, shorter: str, tmp_path: Path
) -> None:
    directory, name = save_tiny(tmp_path, kind), EXPERT[kind]

    def cut(tensors: dict[str, Tensor]) -> None:
        whole = tensors[name]
        tensors[name] = (whole[:-1] if shorter == "rows" else whole[:, :-1]).clone()

    change(directory / "model.safetensors", cut)
    message = refused(directory)
    assert name in message and "has shape" in message


def test_all_experts_lacking_one_projection_are_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".1.mlp" in name and "up_proj" in name]:
            del tensors[name]

    change(directory / "model.safetensors", drop)
    assert f"the experts {WHOLE} need 8 tensors" in refused(directory)


def test_a_layer_without_any_expert_is_refused_by_name(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".1.mlp.experts" in name]:
            del tensors[name]

    change(directory / "model.safetensors", drop)
    assert f"no tensors for the experts {WHOLE}" in refused(directory)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_fused_experts_of_another_shape_are_refused_by_name(axis: int, tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path, save_original_format=False)  # type: ignore[operator]

    def cut(tensors: dict[str, Tensor]) -> None:
        whole = tensors[WHOLE]
        tensors[WHOLE] = whole.narrow(axis, 0, whole.shape[axis] - 1).clone()

    change(tmp_path / "model.safetensors", cut)
    message = refused(tmp_path)
    assert WHOLE in message and "has shape" in message


def test_more_experts_than_the_config_says_are_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_experts": 4}))
    assert "need 4 tensors mlp.experts.*.gate_proj.weight, but there are 8" in refused(directory)


@pytest.mark.parametrize("kind", ["olmoe", "switch_transformers"])
def test_weights_that_the_library_would_make_up_are_refused_by_name(
    kind: str, tmp_path: Path
) -> None:
    directory = save_tiny(tmp_path, kind)
    name = ATTENTION if kind == "olmoe" else "decoder.block.0.layer.0.SelfAttention.q.weight"
    change(directory / "model.safetensors", lambda tensors: tensors.pop(name))
    assert name in refused(directory)


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[ATTENTION] = tensors[ATTENTION][:-1].clone()

    change(directory / "model.safetensors", cut)
    assert f"{ATTENTION} has shape (31, 32), but the model needs (32, 32)" in refused(directory)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
@pytest.mark.parametrize("kind", ["olmoe", "switch_transformers"])
def test_a_truncated_file_is_refused_by_name(kind: str, keep: int, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, kind)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is missing or damaged" in refused(directory)


def test_the_tensor_at_which_a_file_is_truncated_is_named(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "olmoe") / "model.safetensors"
    entry = read_header(path)[EXPERT["olmoe"]]
    os.truncate(path, entry.start + 7)
    assert f"cut in {EXPERT['olmoe']}" in refused(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("olmoe").save_pretrained(tmp_path, max_shard_size="60KB")  # type: ignore[operator]
    return tmp_path


def shard_of(directory: Path, name: str) -> str:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return str(index["weight_map"][name])


def test_a_missing_shard_is_refused_by_name(sharded: Path) -> None:
    shard = shard_of(sharded, EXPERT["olmoe"])
    (sharded / shard).unlink()
    assert f"{shard} is missing or damaged" in refused(sharded)


def test_a_tensor_that_only_the_index_lists_is_refused_by_name(sharded: Path) -> None:
    change(sharded / shard_of(sharded, EXPERT["olmoe"]), lambda t: t.pop(EXPERT["olmoe"]))
    assert EXPERT["olmoe"] in refused(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_a_file_that_is_no_index_is_refused_by_name(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is not an index of weights" in refused(sharded)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert "only safetensors are read" in refused(directory)


def test_a_refused_directory_is_left_as_it_was(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    change(directory / "model.safetensors", lambda tensors: tensors.pop(EXPERT["olmoe"]))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    refused(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
