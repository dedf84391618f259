"""What goes wrong beside or inside a step leaves an engine that works on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("triton")

from runtime.cuda.decode import predictor_thread as predictor_thread
from runtime.cuda.device_budget import reserved_bytes
from runtime.cuda.prefill.streaming_pool import StreamingPool
from runtime.weights.arena import expert_bytes
from runtime.weights.source import from_module
from tests.gpu.offloaded import (
    MOE_8X32,
    PREDICTOR,
    allocated,
    check_slots,
    generate,
    needs_gpu,
    offloaded,
    stock_tokens,
)
from tests.helpers.tiny import tiny_model

pytestmark = needs_gpu


def decoder_of(model: Any) -> Any:
    return model.expertflow._backend.decoder


# ---------------------------------------------------------------------- the predictor


class Raising:
    """A session that fails at its `number`-th run."""

    def __init__(self, session: Any, number: int) -> None:
        self._session, self._left = session, number

    def run(self, *args: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the predictor's weights are gone")
        return self._session.run(*args)


class Hanging:
    """A session that answers only when it is let go."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def run(self, *_: Any) -> Any:
        self.go_on.wait(20)
        raise RuntimeError("too late")


def replace_session(model: Any, session: Any) -> None:
    forecaster = decoder_of(model).driver.thread._forecaster
    forecaster.file = forecaster.file._replace(session=session)


def failure_of(model: Any, seconds: float = 8.0) -> str:
    """Generate until the predictor is given up."""
    end = time.perf_counter() + seconds
    while decoder_of(model).driver.thread.failure is None and time.perf_counter() < end:
        generate(model)
        time.sleep(0.02)
    return str(decoder_of(model).driver.thread.failure)


@pytest.fixture(scope="module")
def expected() -> Iterator[torch.Tensor]:
    with offloaded(MOE_8X32, memory=1.0) as model:
        yield generate(model)


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_predictor_that_raises_is_given_up(number: int, expected: torch.Tensor) -> None:
    with offloaded(MOE_8X32, predictor=PREDICTOR, prefetch=True) as model:
        session = decoder_of(model).driver.thread._forecaster.file.session
        replace_session(model, Raising(session, number))
        assert torch.equal(generate(model), expected)
        assert "weights are gone" in failure_of(model)
        for _ in range(2):
            assert torch.equal(generate(model), expected)
        assert model.expertflow.decode_path == "graph"
        check_slots(model)


def test_a_predictor_that_hangs_is_given_up_and_never_waited_for(
    expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor_thread, "SILENT_AFTER", 0.3)
    monkeypatch.setattr(predictor_thread, "SILENT_PER_TOKEN", 0.0, raising=False)
    session = Hanging()
    try:
        with offloaded(MOE_8X32, predictor=PREDICTOR) as model:
            generate(model)  # captures
            replace_session(model, session)
            start = time.perf_counter()
            assert torch.equal(generate(model), expected)
            assert time.perf_counter() - start < 10
            assert "answer" in failure_of(model)
            assert torch.equal(generate(model), expected)
            assert model.expertflow.decode_path == "graph"
            check_slots(model)
    finally:
        session.go_on.set()


def test_the_predictors_threads_end_with_the_engine() -> None:
    def running() -> set[threading.Thread]:
        threads = threading.enumerate()
        return {thread for thread in threads if thread.name.startswith("expertflow-")}

    before = running()
    with offloaded(MOE_8X32, predictor=PREDICTOR) as model:
        generate(model)
        names = {thread.name for thread in running() - before}
        assert names == {"expertflow-predictor", "expertflow-learning_0"}
    time.sleep(0.1)
    assert running() == before


# ---------------------------------------------------------------------- the model


def test_numbers_that_are_not_finite_are_reported_and_the_engine_works_after_the_mend() -> None:
    with offloaded(tiny_model("olmoe")) as model:
        generate(model)
        weight = model.model.layers[1].post_attention_layernorm.weight
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        for batch in (1, 3):
            with pytest.raises(FloatingPointError, match="not finite"):
                generate(model, batch)
        with torch.no_grad():
            weight.copy_(saved)
        for batch in (2, 1, 3):  # the storage of keys and values is shared
            assert torch.equal(generate(model, batch), stock_tokens("olmoe", batch))
        check_slots(model)


class Interrupting(BaseStreamer):
    """Ctrl-C at the `number`-th token."""

    def __init__(self, number: int) -> None:
        self._left = number

    def put(self, _: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt

    def end(self) -> None: ...


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("number", [1, 2, 7])
def test_an_interrupted_generation_does_not_disturb_the_next(
    number: int, options: dict[str, Any]
) -> None:
    with offloaded(tiny_model("olmoe"), prefetch=True) as model:
        with pytest.raises(KeyboardInterrupt):
            generate(model, streamer=Interrupting(number), **options)
        check_slots(model)
        assert torch.equal(generate(model), stock_tokens("olmoe", 1))
        assert model.expertflow.decode_path == "graph"


# ---------------------------------------------------------------------- allocations

FULL = torch.OutOfMemoryError, ValueError


def test_memory_that_runs_out_in_a_capture_leaves_the_engine_usable() -> None:
    with offloaded(tiny_model("olmoe")) as model:
        decoder = decoder_of(model)
        forward = decoder.model.forwards.plain

        def failing(*args: Any, **kwargs: Any) -> Any:
            if torch.cuda.is_current_stream_capturing():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(*args, **kwargs)

        decoder.model.forwards.plain = failing
        with pytest.raises(FULL):
            generate(model)
        for step in decoder.steps.values():
            step._forward = forward
        decoder.model.forwards.plain = forward
        assert torch.equal(generate(model), stock_tokens("olmoe", 1))
        assert model.expertflow.decode_path == "graph"
        check_slots(model)


def test_a_context_that_does_not_fit_is_an_error_and_the_model_can_be_had_back() -> None:
    model: Any = tiny_model("olmoe")
    with offloaded(model, context=1 << 44), pytest.raises(FULL):
        generate(model)
    assert torch.equal(generate(model), stock_tokens("olmoe", 1))


def test_a_budget_that_is_too_small_leaves_the_model_as_it_was() -> None:
    model: Any = tiny_model("olmoe")
    with pytest.raises(ValueError, match="slots"), offloaded(model, memory="1KB"):
        pass
    assert torch.equal(generate(model), stock_tokens("olmoe", 1))


def test_a_budget_that_holds_the_experts_only_without_the_embedding_keeps_it_on_the_host() -> None:
    model: Any = tiny_model("olmoe")
    source = from_module(model, None)
    least = source.layers[0].top_k * expert_bytes(source.store.specs(0))
    reserved = reserved_bytes(source, context=40, batch=1)
    memory = reserved + source.fixed_bytes + least - 1000
    with offloaded(model, memory=memory, context=40, batch=1):
        assert model.expertflow._backend._dense.num_bytes == 256 * 32 * 4
        assert model.expertflow.stats().num_slots == source.layers[0].top_k
        assert torch.equal(generate(model), stock_tokens("olmoe", 1))
        assert model.expertflow.decode_path == "graph"
    assert torch.equal(generate(model), stock_tokens("olmoe", 1))


def test_slots_that_cannot_be_allocated_leave_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = tiny_model("olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    level = allocated()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(StreamingPool, "__init__", full)
        with pytest.raises(FULL), offloaded(model):
            pass
    after = model.state_dict()
    assert all(torch.equal(after[name].cpu(), tensor) for name, tensor in before.items())
    assert allocated() == level
    with offloaded(model):
        assert torch.equal(generate(model), stock_tokens("olmoe", 1))
