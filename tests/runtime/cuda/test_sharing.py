"""The GPU engine shared by threads, nested and interleaved calls; and gradients through it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("triton")

from runtime.cuda.decode.predictor_thread import PredictorRequest, PredictorThread
from runtime.cuda.streams import CudnnAttention, StreamOrder
from runtime.serving.request import Request
from tests.helpers import interpreter
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.tiny import tiny_model

interpreter.mend()
NEW = 3
SMALL: dict[str, Any] = {"num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


def prompt(seed: int) -> Tensor:
    return torch.randint(2, 256, (1, 5), generator=torch.Generator().manual_seed(seed))


def continued(model: Any, ids: Tensor, **options: Any) -> Tensor:
    tokens: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        eos_token_id=None, **options,
    )  # fmt: skip
    return tokens


def served(ids: Tensor, name: str = "a") -> Request:
    return Request(id=name, prompt=ids[0].tolist(), max_tokens=NEW, ignore_eos=True)


def gradients(model: Any) -> dict[str, Tensor]:
    ids = torch.cat([prompt(0), prompt(1)])
    model(ids, labels=ids).loss.backward()
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None and ".experts." not in name}


# ---------------------------------------------------------------------- gradients


@pytest.mark.filterwarnings("ignore:the experts of an offloaded model")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("olmoe", torch.float32), ("olmoe", torch.bfloat16), ("gpt_oss", torch.float32)],
)
def test_gradients_go_around_the_kernels(kind: str, dtype: torch.dtype) -> None:
    """Those compute the forward pass; experts of the backward pass come from pinned memory."""
    exact = gradients(tiny_model(kind, **SMALL))
    stock = gradients(tiny_model(kind, **SMALL).to(dtype))
    model = load_fake(tiny_model(kind, **SMALL).to(dtype), memory=0.25)
    ours = gradients(model)
    assert ours.keys() == stock.keys()
    for name, want in exact.items():
        bound = 1e-4 if dtype == torch.float32 else 0.02
        theirs = float((stock[name].float() - want).norm() / want.norm())
        assert float((ours[name].float() - want).norm() / want.norm()) <= bound + 1.5 * theirs
    model.expertflow.check_integrity()


# ---------------------------------------------------------------------- one engine, many callers


def test_generations_of_several_threads_have_the_storage_one_after_the_other() -> None:
    stock = tiny_model("olmoe", **SMALL)
    want = [continued(stock, prompt(seed)) for seed in range(3)]
    model = load_fake(tiny_model("olmoe", **SMALL), memory=0.5)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda seed: continued(model, prompt(seed)), range(3)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, want, strict=True))
    assert model.expertflow.decode_path == "graph"


class Between(BaseStreamer):
    """Calls something between the tokens of a generation."""

    def __init__(self, call: Any) -> None:
        self._call, self.results = call, list[Any]()

    def put(self, value: Tensor) -> None:
        self.results.append(self._call())

    def end(self) -> None:
        pass


@pytest.mark.filterwarnings("ignore:decoding runs outside .* another generation")
def test_a_generation_between_the_tokens_of_another_runs_beside_its_captured_steps() -> None:
    stock: Any = tiny_model("olmoe", **SMALL)
    want, inner = continued(stock, prompt(0)), continued(stock, prompt(1))
    whole = stock(prompt(2)).logits
    model: Any = load_fake(tiny_model("olmoe", **SMALL), memory=0.5)

    @torch.no_grad()
    def both() -> tuple[Tensor, Tensor]:
        return continued(model, prompt(1)), model(prompt(2)).logits

    between = Between(both)  # the first time for the prompt, before anything is captured
    assert torch.equal(continued(model, prompt(0), streamer=between), want)
    assert len(between.results) == NEW + 1
    for tokens, logits in between.results:
        assert torch.equal(tokens, inner)
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)
    assert torch.equal(continued(model, prompt(0)), want)
    assert model.expertflow.decode_path == "graph"


def test_generating_while_served_sequences_are_in_flight_leaves_their_rows_alone() -> None:
    stock = tiny_model("olmoe", **SMALL)
    want = [continued(stock, prompt(seed)) for seed in range(2)]
    model: Any = load_fake(tiny_model("olmoe", **SMALL), memory=0.5, batch=2)
    tokens: list[Tensor] = []

    def generate(_: Any) -> None:
        with pytest.warns(UserWarning, match="served sequences"):
            tokens.append(continued(model, prompt(1)))

    request = Request(prompt=prompt(0)[0].tolist(), max_tokens=NEW, ignore_eos=True,
                      on_token=generate)  # fmt: skip
    (result,) = model.expertflow.serve([request])
    assert list(result.token_ids) == want[0][0, 5:].tolist()
    assert len(tokens) == NEW and all(torch.equal(one, want[1]) for one in tokens)


def test_a_second_serve_is_refused_while_the_first_has_sequences_in_flight() -> None:
    want = continued(tiny_model("olmoe", **SMALL), prompt(1))
    engine = load_fake(tiny_model("olmoe", **SMALL), memory=0.5, batch=2).expertflow
    long = Request(prompt=[3, 4, 5], max_tokens=8, ignore_eos=True)
    short = Request(prompt=[3, 4, 5], max_tokens=1, ignore_eos=True)
    first = engine.serve([short, long])
    next(first)
    with pytest.warns(UserWarning, match="in use by another serve .* one model.expertflow.serve"):
        (refused,) = engine.serve([served(prompt(1))])
    assert refused.finish == "error" and refused.token_ids == ()
    first.close()  # an iterator that nobody reads any more leaves its rows
    (result,) = engine.serve([served(prompt(1))])
    assert list(result.token_ids) == want[0, 5:].tolist()


# ---------------------------------------------------------------------- streams, switches, thread


def test_a_turn_on_another_stream_waits_for_the_stream_of_the_last_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each thread has a current stream of its own, and slots are in use until it gets there."""
    main, streams = threading.current_thread(), {"main": Mock(), "worker": Mock()}
    monkeypatch.setattr(
        torch.cuda, "current_stream",
        lambda _: streams["main" if threading.current_thread() is main else "worker"],
    )  # fmt: skip
    order = StreamOrder(torch.device("cpu"))

    def turn() -> None:
        with order.turn():
            pass

    for _ in range(2):
        turn()
    assert not streams["main"].wait_stream.called
    worker = threading.Thread(target=turn)
    worker.start()
    worker.join()
    streams["worker"].wait_stream.assert_called_once_with(streams["main"])
    turn()
    streams["main"].wait_stream.assert_called_once_with(streams["worker"])


def test_offloading_leaves_the_processes_random_numbers_alone() -> None:
    model = tiny_model("olmoe", **SMALL)
    before = torch.get_rng_state()
    load_fake(model, memory=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_by_cudnn_is_off_until_the_last_of_several_passes_has_ended() -> None:
    switch, before = CudnnAttention(), torch.backends.cuda.cudnn_sdp_enabled()
    assert before
    try:
        for call in ("turn_off", "turn_off", "turn_back"):
            getattr(switch, call)()
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        switch.turn_back()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_questions_of_other_batch_sizes_do_not_reach_the_predictor_together() -> None:
    """Interleaved loops ask in turns; the predictor goes on with the newest."""
    thread = Mock(_requests=Mock())
    asked = [
        PredictorRequest(np.zeros((rows, 1)), np.zeros((rows, 1)), None, is_new=False)
        for rows in (1, 2, 2)
    ]
    thread._requests.get.side_effect = asked
    thread._requests.empty.side_effect = [False, False, True]
    assert PredictorThread._take(thread) == asked[1:]
