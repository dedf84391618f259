"""Plain steps first, compiled ones from a later generation on; the GPU engine on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

pytest.importorskip("triton")

from runtime.cuda.compiling import step_forwards
from runtime.cuda.compiling.artefacts import Artefacts
from runtime.cuda.compiling.background import CompilerProcess, Task
from runtime.serving.request import Request
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.tiny import tiny_model


class FakeProcess:
    """A process of the compiler's that ends when it is told to."""

    made: list[FakeProcess] = []  # noqa: RUF012
    failure: str | None = None

    def __init__(self, task: Task) -> None:
        self.task, self.is_running, self.was_closed = task, True, False
        self.made.append(self)

    def close(self) -> None:
        self.was_closed = True


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(step_forwards, "CompilerProcess", FakeProcess)
    monkeypatch.setattr(FakeProcess, "made", [])
    torch._dynamo.reset()
    counters.clear()
    with fake_cuda(monkeypatch):
        yield


def generate(model: Any, count: int = 3) -> Tensor:
    ids_BT = torch.arange(5, 12)[None]
    tokens: Tensor = model.generate(ids_BT, max_new_tokens=count, do_sample=False)
    return tokens


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_steps_switch_between_generations_and_say_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    want = generate(model)
    engine = load_fake(model, memory=0.5, compile="auto").expertflow
    with caplog.at_level(logging.INFO):
        assert torch.equal(generate(model), want)
        assert torch.equal(generate(model), want)
        assert (graphs(), len(FakeProcess.made)) == (0, 1)
        FakeProcess.made[0].is_running = False
        assert torch.equal(generate(model), want)
        assert torch.equal(generate(model), want)
    assert graphs() == 1
    said = [r.message for r in caplog.records if r.name == step_forwards.__name__]
    assert said == ["decode steps are compiled from here on"]
    engine.check_integrity()
    assert len(FakeProcess.made) == 1


def test_a_generation_goes_on_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    load_fake(model, memory=0.5, compile="auto")

    class Ending:
        def put(self, _: Tensor) -> None:
            for process in FakeProcess.made:
                process.is_running = False

        def end(self) -> None:
            assert graphs() == 0

    model.generate(torch.arange(5, 12)[None], max_new_tokens=5, streamer=Ending())
    generate(model)
    assert graphs() == 1


def test_artefacts_of_an_earlier_load_need_no_process() -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    forwards = load_fake(
        model, memory=0.5, compile="auto"
    ).expertflow._backend.decoder.model.forwards
    want = generate(model)
    kept = FakeProcess.made.pop().task.artefacts
    forwards.close()
    kept._write(b"made by another process")
    model.expertflow.detach()
    load_fake(model, memory=0.5, compile="auto")
    assert torch.equal(generate(model), want)
    assert graphs() == 0, "the first generation does not wait"
    assert torch.equal(generate(model), want)
    assert (graphs(), FakeProcess.made) == (1, [])


@pytest.mark.parametrize("when", ["in its process", "at the switch"])
def test_a_compilation_that_fails_leaves_plain_steps_and_is_said_once(
    when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    want = generate(model)
    engine = load_fake(model, memory=0.5, compile="auto").expertflow
    assert torch.equal(generate(model), want)
    process, forwards = FakeProcess.made[0], engine._backend.decoder.model.forwards
    process.is_running = False
    if when == "in its process":
        process.failure = "no compiler here"
    else:

        def failing(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no compiler here")

        monkeypatch.setattr(forwards, "_compiled", failing)
    for _ in range(3):
        assert torch.equal(generate(model), want)
    assert "no compiler here" in forwards.failure
    assert len([r for r in caplog.records if "no compiler here" in r.message]) == 1
    engine.check_integrity()


def test_served_steps_switch_when_no_sequence_is_in_flight() -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    asked = [Request(id="a", prompt=list(range(5, 12)), max_tokens=4)]
    engine = load_fake(model, memory=0.75, compile="auto", batch=2).expertflow
    plain = [result.token_ids for result in engine.serve(asked)]
    assert (graphs(), len(FakeProcess.made)) == (0, 1)
    FakeProcess.made[0].is_running = False
    assert [result.token_ids for result in engine.serve(asked)] == plain
    assert graphs() == 1


def test_a_closed_engine_ends_the_process() -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    load_fake(model, memory=0.5, compile="auto")
    generate(model)
    model.expertflow.close()
    assert FakeProcess.made[0].was_closed


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    """A real one: its interpreter finds the package, and no blueprint."""
    process = CompilerProcess(Task(b"nothing", Artefacts("a")))
    process._process.wait(timeout=300)
    assert process.failure is not None
    assert "UnpicklingError" in process.failure or "pickle" in process.failure
    process.close()
