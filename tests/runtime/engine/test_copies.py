"""Copies and files of an offloaded model: complete, or refused before anything is written."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from runtime.engine.guards.placeholder import Placeholder
from tests.helpers.offloading import logits, offload
from tests.helpers.tiny import KINDS, tiny_model

Directory = Callable[[str], Path]
Copy = Callable[[Any, Path], Any]

COPIES: dict[str, Copy] = {
    "copy": lambda model, _: copy.copy(model),
    "deep copy": lambda model, _: copy.deepcopy(model),
    "deep copy of the decoder": lambda model, _: copy.deepcopy(model.model),
    "deep copy of a layer": lambda model, _: copy.deepcopy(model.model.layers[1]),
    "deep copy of the experts": lambda model, _: copy.deepcopy(model.model.layers[1].mlp.experts),
    "deep copy of the engine": lambda model, _: copy.deepcopy(model.expertflow),
    "deep copy of the state dict": lambda model, _: copy.deepcopy(model.state_dict()),
    "pickle": lambda model, _: pickle.dumps(model),
    "pickle of the engine": lambda model, _: pickle.dumps(model.expertflow),
    "torch.save": lambda model, _: torch.save(model, io.BytesIO()),
    "torch.save of the state dict": lambda model, _: torch.save(model.state_dict(), io.BytesIO()),
    "torch.save of a layer": lambda model, _: torch.save(
        model.model.layers[0].state_dict(), io.BytesIO()
    ),
    "a clone of the state dict": lambda model, _: {
        name: value.clone() for name, value in model.state_dict().items()
    },
    "save_file": lambda model, path: safetensors.torch.save_file(model.state_dict(), path / "m"),
    "save_model": lambda model, path: safetensors.torch.save_model(model, str(path / "m")),
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "push_to_hub": lambda model, _: model.push_to_hub("somebody/model"),
    "data parallel replicas": lambda model, _: model._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("where", ["memory", "directory", "closed"])
def test_a_copy_without_experts_is_refused_and_nothing_is_written(
    make: Copy, where: str, tiny_directory: Directory, tmp_path: Path
) -> None:
    model: Any = offload(tiny_model("olmoe") if where == "memory" else tiny_directory("olmoe"))
    before = logits(model)
    if where == "closed":
        model.expertflow.close()
    with pytest.raises((ValueError, AttributeError), match=r"offloaded|no attribute 'expertflow'"):
        make(model, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]
    if where != "closed":
        assert torch.equal(logits(model), before)


def test_accelerate_saves_no_model_without_experts(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = offload(tiny_model("olmoe"))
    with pytest.raises(ValueError, match="is offloaded"):
        accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_holds_no_experts_can_be_copied() -> None:
    model = offload(tiny_model("olmoe"))
    head = copy.deepcopy(model.lm_head)
    assert torch.equal(head.weight, model.lm_head.weight)
    attention = copy.deepcopy(model.model.layers[0].self_attn.state_dict())
    stock: Any = tiny_model("olmoe")
    stock.model.layers[0].self_attn.load_state_dict(attention)
    torch.save(model.lm_head.state_dict(), io.BytesIO())


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_are_listed_as_in_the_stock_model(
    kind: str, tiny_directory: Directory
) -> None:
    stock: Any = tiny_model(kind)
    for model in (offload(tiny_model(kind)), offload(tiny_directory(kind))):
        ours, theirs = dict(model.named_parameters()), dict(stock.named_parameters())
        assert list(ours) == list(theirs)
        for name, parameter in theirs.items():
            mine = ours[name]
            assert isinstance(mine, torch.nn.Parameter)
            assert (mine.shape, mine.dtype, mine.device) == (
                parameter.shape, parameter.dtype, parameter.device,
            ), name  # fmt: skip
            assert isinstance(mine, Placeholder) == ("experts" in name)
        assert list(model.state_dict()) == list(stock.state_dict())
        assert model.num_parameters() == stock.num_parameters()
        assert model.get_memory_footprint() == stock.get_memory_footprint()
        assert (model.dtype, model.device) == (stock.dtype, stock.device)


def test_what_is_printed_says_that_experts_are_offloaded() -> None:
    model = offload(tiny_model("olmoe"))
    assert repr(model).count("8 experts, offloaded") == 1, "of four layers that look the same"
    assert repr(next(model.model.layers[0].mlp.experts.parameters())) == (
        "<model.layers.0.mlp.experts.gate_up_proj: (8, 48, 32) torch.float32, offloaded>"
    )
    assert repr(model.expertflow.detach()) == repr(tiny_model("olmoe"))


def test_dense_weights_are_read_from_an_offloaded_models_state_dict(tmp_path: Path) -> None:
    state = offload(tiny_model("olmoe")).state_dict()
    dense = {name: value for name, value in state.items() if "experts" not in name}
    safetensors.torch.save_file(dense, tmp_path / "dense.safetensors")
    stock: Any = tiny_model("olmoe", 5)
    found = stock.load_state_dict(
        safetensors.torch.load_file(tmp_path / "dense.safetensors"), strict=False
    )
    assert len(found.missing_keys) == len(state) - len(dense)


def test_a_detached_model_is_saved_whole(tiny_directory: Directory, tmp_path: Path) -> None:
    for index, given in enumerate((tiny_model("olmoe"), tiny_directory("olmoe"))):
        model = offload(given)
        expected = logits(model)
        model.expertflow.detach().save_pretrained(tmp_path / str(index))
        again = type(model).from_pretrained(tmp_path / str(index))
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
        assert torch.equal(logits(copy.deepcopy(model)), logits(again))
