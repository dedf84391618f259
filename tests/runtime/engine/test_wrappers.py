"""Wrappers around a model, before and after loading, and tools that call or trace it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import runtime
from tests.helpers.offloading import check, generate, logits, offload
from tests.helpers.tiny import save_tiny, tiny_model

Change = Callable[[Any], Any]
Directory = Callable[[str], Path]


class Wrapper(nn.Module):
    """A module of the user's own around a model."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner


def experts(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


def with_own_forward(model: Any) -> Any:
    stock = experts(model).forward
    experts(model).forward = lambda *args: stock(*args) * 2
    return model


def parametrised(model: Any) -> Any:
    nn.utils.parametrize.register_parametrization(experts(model), "gate_up_proj", nn.Identity())
    return model


def normalised(model: Any) -> Any:
    nn.utils.weight_norm(experts(model), "gate_up_proj")
    return model


REFUSED: dict[str, tuple[Change, str]] = {
    "data parallel": (nn.DataParallel, r"DataParallel is a wrapper: .* runtime.load\(model\)"),
    "compiled": (torch.compile, r"OptimizedModule is a wrapper: .* wrapper\._orig_mod"),
    "a module of one's own": (Wrapper, r"Wrapper is a wrapper: .* wrapper\.inner"),
    "no model": (lambda _: nn.Linear(2, 2), "Linear is not a model of transformers"),
    "an offloaded model": (offload, r"offloaded already; call model.expertflow.detach\(\) first"),
    "a wrapped offloaded model": (lambda model: Wrapper(offload(model)), "Wrapper is a wrapper"),
    "on the meta device": (lambda model: model.to("meta"), "on the meta device and has no values"),
    "experts with a forward": (with_own_forward, r"experts has a forward of its own"),
    "experts parametrised": (parametrised, "experts is parametrised"),
    "experts normalised": (normalised, "experts is parametrised"),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(("wrap", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_stock_model_is_refused_when_it_is_loaded(
    wrap: Change, message: str
) -> None:
    wrapped = wrap(tiny_model("olmoe"))
    with pytest.raises(ValueError, match=message):
        runtime.load(wrapped, memory=0.25)


def test_a_closed_model_cannot_be_loaded_again(tiny_directory: Directory) -> None:
    model: Any = runtime.load(tiny_directory("olmoe"), memory=0.25)
    model.expertflow.close()
    with pytest.raises(ValueError, match="experts are gone; load it again"):
        runtime.load(model)


def scattered(make: Callable[[Any, Any, Path], Any], tmp_path: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return make(accelerate, tiny_model("olmoe"), tmp_path)


PLACES = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
    "model.layers": "disk",
}  # fmt: skip
DISPATCHED: dict[str, Callable[[Any, Any, Path], Any]] = {
    "cpu_offload": lambda accelerate, model, _: accelerate.cpu_offload(
        model, execution_device="cpu"
    ),
    "disk_offload": lambda accelerate, model, path: accelerate.disk_offload(
        model, path, execution_device="cpu"
    ),
    "device_map": lambda accelerate, model, path: type(model).from_pretrained(
        save_tiny(path / "model", "olmoe"), device_map=PLACES, offload_folder=path / "offload"
    ),
}


@pytest.mark.parametrize("make", DISPATCHED.values(), ids=DISPATCHED)
def test_a_model_that_accelerate_has_dispatched_is_refused_with_the_mend(
    make: Callable[[Any, Any, Path], Any], tmp_path: Path
) -> None:
    model = scattered(make, tmp_path)
    with pytest.raises(ValueError, match=r"accelerate has dispatched .* without device_map"):
        runtime.load(model, memory=0.25)


@pytest.mark.parametrize("name", ["cpu_offload", "disk_offload"])
def test_accelerate_does_not_take_the_experts_of_an_offloaded_model(
    name: str, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = offload(tiny_model("olmoe"))
    with pytest.raises(ValueError, match="is offloaded"):
        DISPATCHED[name](accelerate, model, tmp_path)


def test_a_model_on_one_device_is_not_dispatched(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    kind = type(tiny_model("olmoe"))
    model: Any = kind.from_pretrained(save_tiny(tmp_path, "olmoe"), device_map="auto")  # type: ignore[attr-defined]
    expected = logits(model)
    torch.testing.assert_close(logits(offload(model)), expected, rtol=0, atol=1e-5)


def test_accelerate_prepares_an_offloaded_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.Accelerator(cpu=True).prepare(offload(tiny_model("olmoe")))
    torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")), rtol=0, atol=1e-5)
    check(model)


def test_one_device_in_parallel_is_the_model_itself() -> None:
    model = offload(tiny_model("olmoe"))
    ids = torch.tensor([[2, 3, 4]])
    with torch.inference_mode():
        assert torch.equal(nn.DataParallel(model)(ids).logits, model(ids).logits)
    assert model.expertflow.stats().steps == 2


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", ["DistributedDataParallel", "fully_shard"])
def test_weights_are_not_spread_over_processes(name: str, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    wrap: Change = fully_shard if name == "fully_shard" else nn.parallel.DistributedDataParallel
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="is offloaded"):
            wrap(offload(tiny_model("olmoe")))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("compile", [
    lambda model: torch.compile(model, backend="eager"),
    lambda model: model.compile(backend="eager") or model,
], ids=["torch.compile", "model.compile"])  # fmt: skip
def test_a_compiled_offloaded_model_is_exact(compile: Change) -> None:
    torch._dynamo.reset()
    stock, model = (
        tiny_model("olmoe", num_hidden_layers=2),
        tiny_model("olmoe", num_hidden_layers=2),
    )
    compiled = compile(offload(model))
    torch.testing.assert_close(logits(compiled), logits(stock), rtol=0, atol=1e-5)
    assert torch.equal(generate(compiled), generate(stock))
    assert compiled.expertflow.stats().steps == 9
    check(compiled)


def trace(model: Any, ids: Tensor) -> Any:
    with torch.no_grad():
        return torch.jit.trace(model, (ids,), strict=False)


TRACES: dict[str, Callable[[Any, Tensor], Any]] = {
    "torch.jit.trace": trace,
    "torch.export": lambda model, ids: torch.export.export(model, (ids,)),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("take", TRACES.values(), ids=TRACES)
def test_a_trace_which_would_keep_one_calls_experts_is_refused(
    take: Callable[[Any, Tensor], Any],
) -> None:
    model = offload(tiny_model("olmoe"))
    before = logits(model)
    with pytest.raises(ValueError, match=r"detach\(\) first"):
        take(model, torch.tensor([[2, 3, 4]]))
    assert torch.equal(logits(model), before)
    check(model)


def test_hooks_of_all_modules_are_called() -> None:
    """torch's global hooks, which a profiler puts on."""
    model, stock = offload(tiny_model("olmoe")), tiny_model("olmoe")
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        ours = logits(model)
        called, seen = seen, []
        torch.testing.assert_close(ours, logits(stock), rtol=0, atol=1e-5)
    finally:
        handle.remove()
    assert called.count("OlmoeExperts") == seen.count("OlmoeExperts") == 4


def test_another_default_dtype_changes_nothing() -> None:
    stock = logits(tiny_model("olmoe"))
    model = offload(tiny_model("olmoe"))
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(logits(model), stock, rtol=0, atol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
