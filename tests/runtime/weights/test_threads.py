"""Loading and other threads: what they build meanwhile is complete, of its own class and format."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import runtime
from runtime.engine.guards.placeholder import Placeholder
from runtime.weights.dense.default_dtype import DefaultDtype
from tests.helpers.architectures import architecture_model
from tests.helpers.compatibility import logits
from tests.helpers.tiny import save_tiny, tiny_config, tiny_model


@contextmanager
def meanwhile(build: Callable[[], Any]) -> Iterator[list[Any]]:
    """Results of `build`, called over and over in another thread."""
    stop, results = threading.Event(), list[Any]()

    def other() -> None:
        while not stop.is_set():
            results.append(build())

    thread = threading.Thread(target=other)
    thread.start()
    try:
        yield results
    finally:
        stop.set()
        thread.join()


def kind_of(model: Any) -> tuple[int, set[torch.dtype], bool]:
    experts = [name for name, _ in model.named_parameters() if "experts" in name]
    parameters = list(model.parameters())
    usable = all(not p.is_meta and bool(p.isfinite().all()) for p in parameters)
    return len(experts), {p.dtype for p in parameters}, usable


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("half")
    tiny_model("olmoe").to(torch.bfloat16).save_pretrained(directory)  # type: ignore[operator]
    return directory


def test_models_that_other_threads_build_meanwhile_are_complete(half: Path) -> None:
    config = tiny_config("olmoe")

    def build() -> Any:
        return kind_of(AutoModelForCausalLM.from_config(config))

    with meanwhile(build) as seen:
        for _ in range(10):
            runtime.load(half, memory=0.25)
    assert seen and all(one == (8, {torch.float32}, True) for one in seen)


def test_models_that_other_threads_load_meanwhile_are_complete(tmp_path: Path, half: Path) -> None:
    stock = save_tiny(tmp_path, "olmoe")
    with meanwhile(lambda: kind_of(AutoModelForCausalLM.from_pretrained(stock))) as seen:
        for _ in range(10):
            runtime.load(half, memory=0.25)
    assert seen and all(one == (8, {torch.float32}, True) for one in seen)


def test_two_threads_may_load_at_once(tmp_path: Path) -> None:
    directories = {kind: save_tiny(tmp_path / kind, kind) for kind in ("olmoe", "mixtral")}
    expected = {kind: logits(runtime.load(path)) for kind, path in directories.items()}

    def load() -> Any:
        return logits(runtime.load(directories["mixtral"], memory=0.5))

    with meanwhile(load) as seen:
        for _ in range(5):
            assert torch.equal(logits(runtime.load(directories["olmoe"])), expected["olmoe"])
    assert seen and all(torch.equal(one, expected["mixtral"]) for one in seen)


def test_loading_changes_nothing_that_all_threads_share(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.olmoe import modeling_olmoe

    before = dict(vars(modeling_olmoe)), PreTrainedModel.tie_weights, nn.init.normal_
    built = modeling_olmoe.OlmoeModel.__init__

    def watched(self: Any, *args: Any) -> None:
        now = dict(vars(modeling_olmoe)), PreTrainedModel.tie_weights, nn.init.normal_
        assert now == before and torch.get_default_dtype() == torch.float32
        built(self, *args)

    def refuse(dtype: torch.dtype) -> None:
        raise AssertionError(f"torch's default number format was set to {dtype}")

    monkeypatch.setattr(torch, "set_default_dtype", refuse)
    monkeypatch.setattr(modeling_olmoe.OlmoeModel, "__init__", watched)
    model: Any = runtime.load(half)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert type(model) is modeling_olmoe.OlmoeForCausalLM


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "gpt_oss", "deepseek_v3", "gemma4"])
def test_a_model_in_half_precision_is_built_as_the_library_builds_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture_model(kind).to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[operator]
    stock = type(architecture_model(kind)).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.delattr(torch, "set_default_dtype")
        ours: Any = runtime.load(tmp_path)
    theirs = dict([*stock.named_parameters(), *stock.named_buffers()])
    for name, tensor in (*ours.named_parameters(), *ours.named_buffers()):
        assert tensor.dtype == theirs[name].dtype, name
        assert isinstance(tensor, Placeholder) or torch.equal(tensor, theirs[name]), name


def test_a_failed_load_leaves_classes_and_formats_as_they_were(half: Path, tmp_path: Path) -> None:
    from transformers.models.olmoe import modeling_olmoe

    before = dict(vars(modeling_olmoe))
    with pytest.raises(ValueError, match="floating-point"):
        runtime.load(half, dtype="int8")
    assert dict(vars(modeling_olmoe)) == before and torch.get_default_dtype() == torch.float32


def test_the_default_format_is_that_of_calls_which_say_none() -> None:
    with DefaultDtype(torch.bfloat16):
        made = [torch.zeros(2), torch.tensor(0.5), torch.full((2,), 1.0), torch.arange(4) / 2]
        said = [torch.zeros(2, dtype=torch.float32), torch.arange(4).float()]
        layer = nn.Linear(2, 2)
    assert {tensor.dtype for tensor in made} == {torch.bfloat16} == {layer.weight.dtype}
    assert {tensor.dtype for tensor in said} == {torch.float32}
    assert torch.zeros(2).dtype == torch.float32


def test_positions_that_ask_for_the_default_format_get_the_models(tmp_path: Path) -> None:
    architecture_model("nllb-moe").to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[operator]
    stock = type(architecture_model("nllb-moe")).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    ours: Any = runtime.load(tmp_path, memory=0.5)
    theirs = dict(stock.named_buffers())
    for name, tensor in ours.named_buffers():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert torch.get_default_dtype() == torch.float32
