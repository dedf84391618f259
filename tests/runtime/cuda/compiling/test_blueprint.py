"""A model without numbers traces to what the live model traces to, for the compiler's caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._functorch._aot_autograd import autograd_cache

pytest.importorskip("triton")

from runtime.cuda.compiling import blueprint, step_forwards
from runtime.cuda.compiling.__main__ import compile_only
from runtime.kv.storage import StorageSize
from runtime.serving.request import Request
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.tiny import tiny_model
from tests.runtime.cuda.compiling.test_switch import FakeProcess, generate

COMPILE = torch.compile
PAGES: dict[str, Any] = {"batch": 3, "context": 128, "cache_tokens": 192, "spill_tokens": 128}


class FoundError(Exception):
    """The compiler has made its key, and need not go on."""


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The keys that the compiler asks its caches for; nothing is compiled."""
    found: list[str] = []
    real = autograd_cache.autograd_cache_key

    def key(*args: Any, **kwargs: Any) -> Any:
        found.append(real(*args, **kwargs)[0])
        raise FoundError

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autograd_cache, "autograd_cache_key", key)
    monkeypatch.setattr(step_forwards, "CompilerProcess", FakeProcess)
    monkeypatch.setattr(FakeProcess, "made", [])
    with fake_cuda(monkeypatch):
        monkeypatch.setattr(torch, "compile", COMPILE)
        yield found


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "serves", "options"),
    [("olmoe", False, {}), ("gpt_oss", True, {}), ("gpt_oss", True, PAGES)],
)
def test_both_processes_have_one_key(
    kind: str, serves: bool, options: dict[str, Any], keys: list[str]
) -> None:
    model: Any = tiny_model(kind, num_hidden_layers=2)
    engine = load_fake(model, memory=0.75, compile="auto", **options).expertflow

    def run() -> None:
        if serves:
            list(engine.serve([Request(id="a", prompt=[5, 6, 7], max_tokens=3)]))
        else:
            generate(model)

    run()
    process = FakeProcess.made[0]
    process.is_running = False
    torch._dynamo.reset()
    run()
    live = list(keys)
    torch._dynamo.reset()
    with suppress(Exception):
        compile_only(process.task.blueprint)
    assert len(live) == 1
    assert keys == live * 2


def test_tied_weights_stay_tied_and_take_no_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    model.lm_head.weight = model.model.embed_tokens.weight
    step = blueprint.StepShape(
        blueprint.StepKey("generating", 1, 1), StorageSize(1, 8), True, [], torch.device("cpu")
    )
    content = blueprint.pack(model, [], step)
    assert len(content) < 100_000
    with FakeTensorMode():
        bare = blueprint.unpack(content).model
    assert bare.lm_head.weight is bare.model.embed_tokens.weight
    assert isinstance(bare.lm_head.weight.data, FakeTensor)


def test_a_module_whose_forward_was_replaced_is_not_described() -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    model.lm_head.forward = model.lm_head.forward
    step: Any = None
    with pytest.raises(ValueError, match="forward of its Linear was replaced"):
        blueprint.pack(model, [], step)
