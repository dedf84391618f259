"""A model that is changed after loading: captured steps, which repeat the old one, are not used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.tiny import tiny_model
from tests.runtime.cuda.test_backend import generate

pytestmark = pytest.mark.filterwarnings("ignore:decoding runs outside of CUDA graphs")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


def hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: output * 2)


def root_hook(model: Any) -> None:
    def shift(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = output.logits.roll(1, -1)
        return output

    model.register_forward_hook(shift)


def own_forward(model: Any) -> None:
    projection = model.model.layers[1].self_attn.o_proj
    stock = projection.forward
    projection.forward = lambda *args: -stock(*args)


def new_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(3, 0).clone())


def fewer_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


CHANGES: list[tuple[Callable[[Any], None], str]] = [
    (hook, r"model.layers.0.mlp has a forward hook"),
    (root_hook, "the model has a forward hook"),
    (own_forward, r"model.layers.1.self_attn.o_proj has a forward of its own"),
    (new_weight, "it was changed since steps were captured"),
    (fewer_layers, "it was changed since steps were captured"),
]


@pytest.mark.parametrize(
    ("change", "reason"), CHANGES, ids=[change.__name__ for change, _ in CHANGES]
)
def test_decoding_follows_a_change_that_captured_steps_would_not_notice(
    change: Callable[[Any], None], reason: str
) -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    before = generate(model)
    engine = load_fake(model, memory=0.5).expertflow
    assert torch.equal(generate(model), before) and engine.decode_path == "graph"
    stock: Any = tiny_model("olmoe", num_hidden_layers=2)
    change(stock)
    change(model)
    after = generate(model)
    assert torch.equal(after, generate(stock)) and not torch.equal(after, before)
    assert engine.decode_path == reason
    engine.check_integrity()


def test_steps_are_captured_again_when_the_change_is_taken_back() -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    engine = load_fake(model, memory=0.5).expertflow
    want = generate(model)
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    assert torch.equal(generate(model), want) and engine.decode_path != "graph"
    handle.remove()
    assert torch.equal(generate(model), want) and engine.decode_path == "graph"
