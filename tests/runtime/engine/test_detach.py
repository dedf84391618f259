"""An engine leaves nothing behind: the model is what it was, its memory is free."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from tests.helpers.offloading import Predictor, generate, logits, offload
from tests.helpers.tiny import KINDS, tiny_model


def footprint(model: Any) -> dict[str, Any]:
    """Everything about a model that offloading might change."""
    return {
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
        "hooks": {
            name: [len(v) for k, v in sorted(m.__dict__.items()) if "hooks" in k]
            for name, m in model.named_modules()
        },
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "order": list(model.state_dict()),
        "training": {name: m.training for name, m in model.named_modules()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "classes": [type(m) for m in model.modules()],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_detached_model_is_bit_for_bit_what_it_was(kind: str, tiny_predictor: Predictor) -> None:
    model: Any = tiny_model(kind)
    expected, tokens = logits(model), generate(model)
    before = footprint(model)
    offload(model, 0.25, "predicted", predictor=tiny_predictor(kind))
    generate(model)
    assert model.expertflow.detach() is model
    assert footprint(model) == before
    assert torch.equal(logits(model), expected) and torch.equal(generate(model), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_detached_model_from_a_directory_is_the_stock_model(
    kind: str, tiny_directory: Callable[[str], Path]
) -> None:
    model = offload(tiny_directory(kind))
    generate(model)
    model.expertflow.detach()
    stock = type(model).from_pretrained(tiny_directory(kind))
    ours, theirs = model.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=1e-5)
    assert torch.equal(generate(model), generate(stock))
    left, right = footprint(model), footprint(stock)
    for key in left.keys() - {"parameters"}:
        assert left[key] == right[key], key


def test_a_model_in_training_comes_back_in_training_module_by_module() -> None:
    model: Any = tiny_model("olmoe").train()
    model.model.layers[1].eval()
    before = footprint(model)
    offload(model)
    assert not any(module.training for module in model.modules())
    model.expertflow.detach()
    assert footprint(model) == before


def test_the_context_manager_detaches_even_after_an_error() -> None:
    model: Any = tiny_model("olmoe")
    before = footprint(model)

    def fail() -> None:
        with offload(model).expertflow as engine:
            assert model.expertflow is engine
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert footprint(model) == before


def test_detaching_twice_does_nothing_and_the_model_can_be_offloaded_again() -> None:
    model: Any = tiny_model("olmoe")
    expected = generate(model)
    for _ in range(2):
        engine = offload(model).expertflow
        assert torch.equal(generate(model), expected)
        engine.detach()
        engine.detach()
    assert torch.equal(generate(model), expected)


def test_a_detached_models_slots_are_freed() -> None:
    model: Any = tiny_model("olmoe")
    arena = weakref.ref(offload(model).expertflow._backend.pools[0].arena)
    assert arena() is not None
    model.expertflow.detach()
    gc.collect()
    assert arena() is None


def test_a_closed_models_slots_are_freed_at_once(tiny_directory: Callable[[str], Path]) -> None:
    """Without the garbage collector: the cycle between model and engine is broken."""
    model: Any = runtime.load(tiny_directory("olmoe"), memory=0.5)
    logits(model)
    gc.collect()
    gc.disable()
    try:
        slots = weakref.ref(model.expertflow._backend.pools[0].arena.tensors["down_proj"])
        whole = weakref.ref(model)
        model.expertflow.close()
        assert slots() is None
        del model
        assert whole() is None
    finally:
        gc.enable()


def test_a_closed_model_refuses_to_run(tiny_directory: Callable[[str], Path]) -> None:
    model: Any = runtime.load(tiny_directory("olmoe"), memory=0.5)
    engine = model.expertflow
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match=r"engine is closed .* load the model again"):
        logits(model)
    assert not hasattr(model, "expertflow")


def test_closing_gives_a_model_from_memory_its_experts_back() -> None:
    model: Any = tiny_model("olmoe")
    before, expected = footprint(model), logits(model)
    offload(model).expertflow.close()
    assert footprint(model) == before
    assert torch.equal(logits(model), expected)


def test_a_failed_attach_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("olmoe")
    before, expected = footprint(model), logits(model)
    original = type(model).to

    def fail_once(self: Any, *args: Any) -> Any:
        monkeypatch.setattr(type(self), "to", original)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model), "to", fail_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        offload(model)
    assert footprint(model) == before
    assert torch.equal(logits(model), expected)


def test_an_offloaded_model_is_not_saved_without_its_experts(tmp_path: Path) -> None:
    model: Any = runtime.load(tiny_model("olmoe"), memory=0.5)
    with pytest.raises(ValueError, match="saved without its experts"):
        model.save_pretrained(tmp_path)
    model.expertflow.detach().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
