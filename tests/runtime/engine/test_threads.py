"""Threads, nested calls and interleaved loops on one offloaded model: turns, never other tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from routing.shards import TraceReader
from runtime.engine.turns import Turns
from runtime.serving.async_server import AsyncServer
from runtime.serving.request import Request
from tests.helpers.offloading import Predictor, generate, offload
from tests.helpers.tiny import tiny_config, tiny_model, tiny_tokenizer

WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Large enough for threads to meet within a step."""


def prompt(seed: int, length: int = 12) -> Tensor:
    return torch.randint(2, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def continued(model: Any, ids: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tokens


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids).logits
    return found


def served(tokens: Any, ids: Tensor) -> list[int]:
    return [int(token) for token in tokens[0, ids.shape[1] :]]


def together(*runs: Callable[[], Any]) -> list[Any]:
    """The results of functions that run at once, each in a thread."""
    with ThreadPoolExecutor(len(runs)) as threads:
        return [future.result(timeout=120) for future in [threads.submit(run) for run in runs]]


def is_free(model: Any) -> bool:
    """Whether another thread gets a turn at once."""
    (found,) = together(lambda: logits(model, prompt(0)).shape[0] == 1)
    return bool(found)


# ---------------------------------------------------------------------- several threads


def test_threads_that_call_one_model_get_the_stock_models_results(
    tiny_predictor: Predictor,
) -> None:
    stock: Any = tiny_model("olmoe")
    model = offload(tiny_model("olmoe"), 0.25, "predicted", predictor=tiny_predictor("olmoe"))
    seeds = range(4)
    want = [continued(stock, prompt(seed)) for seed in seeds]
    want_logits = [logits(stock, prompt(seed, 20)) for seed in seeds]

    def user(seed: int) -> bool:
        for _ in range(3):
            torch.testing.assert_close(
                logits(model, prompt(seed, 20)), want_logits[seed], rtol=0, atol=1e-5
            )
            model.expertflow.stats().report()
            if not torch.equal(continued(model, prompt(seed)), want[seed]):
                return False
            model.expertflow.check_integrity()
        return True

    assert together(*(partial(user, seed) for seed in seeds)) == [True] * 4


@pytest.mark.parametrize("kind", ["switch_transformers", "mixtral"])
def test_threads_are_right_for_other_kinds_of_experts_too(kind: str) -> None:
    want = generate(tiny_model(kind))
    model = offload(tiny_model(kind), 0.25)
    for got in together(*[partial(generate, model)] * 3):
        assert torch.equal(got, want)


def test_serving_goes_on_beside_generate_and_forward_passes() -> None:
    stock: Any = tiny_model("olmoe")
    prompts = [prompt(seed) for seed in range(4)]
    want = [served(continued(stock, ids), ids) for ids in prompts]
    want_logits = logits(stock, prompts[0])
    model = offload(tiny_model("olmoe"), 0.25)

    async def serve() -> list[list[int]]:
        requests = [
            Request(prompt=ids[0].tolist(), max_tokens=8, ignore_eos=True) for ids in prompts
        ]
        async with AsyncServer(model.expertflow, batch=2) as server:
            results = await asyncio.gather(*(server.complete(request) for request in requests))
        return [list(result.token_ids) for result in results]

    def user() -> None:
        for ids, tokens in zip(prompts, want, strict=True):
            assert served(continued(model, ids), ids) == tokens
            torch.testing.assert_close(logits(model, prompts[0]), want_logits, rtol=0, atol=1e-5)

    served_tokens, *_ = together(lambda: asyncio.run(serve()), user, user)
    assert served_tokens == want


def test_engines_of_two_models_do_not_disturb_each_other() -> None:
    kinds = "olmoe", "mixtral"
    want = [generate(tiny_model(kind)) for kind in kinds]
    models = [offload(tiny_model(kind), 0.25) for kind in kinds]
    for _ in range(3):
        got = together(*(partial(generate, model) for model in models))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


def test_serving_leaves_models_of_the_same_configuration_alone() -> None:
    """`from_config` gives them one object, and serving has an attention of its own."""
    config = tiny_config("olmoe")
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    assert models[0].config is models[1].config
    want, before = logits(models[1], prompt(1)), config.to_dict()
    ids = prompt(2)
    tokens = served(continued(models[0], ids), ids)
    engine = offload(models[0], 0.25).expertflow
    found: list[Tensor] = []
    layer = engine.model.model.layers[1]
    hook = layer.register_forward_hook(lambda *_: found.append(logits(models[1], prompt(1))))
    request = Request(prompt=ids[0].tolist(), max_tokens=8, ignore_eos=True)
    (result,) = engine.serve([request])
    hook.remove()
    assert list(result.token_ids) == tokens and len(found) == 8
    assert all(torch.equal(one, want) for one in found)
    assert config.to_dict() == before and engine.model.config is config


def test_detaching_waits_for_the_generation_and_the_model_runs_on() -> None:
    stock: Any = tiny_model("olmoe", **WIDE)
    want = continued(stock, prompt(1), max_new_tokens=40)
    model: Any = offload(tiny_model("olmoe", **WIDE), 0.25)
    engine, started = model.expertflow, threading.Event()

    class Started(BaseStreamer):
        def put(self, value: Tensor) -> None:
            started.set()

        def end(self) -> None:
            pass

    def detach() -> None:
        started.wait()
        engine.detach()

    def late() -> Tensor:
        started.wait()
        return continued(model, prompt(1), max_new_tokens=40)

    run = partial(continued, model, prompt(1), max_new_tokens=40, streamer=Started())
    first, _, second = together(run, detach, late)
    assert torch.equal(first, want) and torch.equal(second, want)
    assert not hasattr(model, "expertflow")


def test_a_served_model_that_is_detached_ends_with_an_error_that_says_so() -> None:
    engine = offload(tiny_model("olmoe"), 0.5).expertflow
    requests = [Request(prompt=[5, 6, 7], max_tokens=4, ignore_eos=True) for _ in range(2)]
    results = engine.serve(requests, batch=1)
    next(results)
    engine.detach()
    with pytest.raises(ValueError, match="detached or closed"):
        next(results)


def test_turns_are_taken_in_the_order_of_arrival() -> None:
    """A thread that begins one turn after the other does not keep the others out."""
    turns, order, stop = Turns(), list[str](), threading.Event()

    def greedy() -> None:
        while not stop.is_set():
            with turns:
                order.append("greedy")
                time.sleep(0.002)

    def modest() -> None:
        try:
            for _ in range(5):
                with turns:
                    order.append("modest")
        finally:
            stop.set()

    together(greedy, modest)
    assert order.count("greedy") < 30


# ---------------------------------------------------------------------- within one thread


def test_a_forward_pass_within_a_hook_of_another_is_right(tiny_predictor: Predictor) -> None:
    stock: Any = tiny_model("olmoe")
    want, inner = logits(stock, prompt(1)), logits(stock, prompt(2, 7))
    model = offload(tiny_model("olmoe"), 0.25, "predicted", predictor=tiny_predictor("olmoe"))
    seen, depth = list[Tensor](), list[int]()

    def again(*_: Any) -> None:
        if model.expertflow.stats().steps < 2 and len(depth) < 2:
            depth.append(1)
            seen.append(logits(model, prompt(2, 7)))

    hook = model.model.layers[2].self_attn.register_forward_hook(again)
    torch.testing.assert_close(logits(model, prompt(1)), want, rtol=0, atol=1e-5)
    hook.remove()
    for found in seen:
        torch.testing.assert_close(found, inner, rtol=0, atol=1e-5)
    assert model.expertflow.stats().steps == 3


def test_a_call_from_within_a_step_of_serve_is_refused_and_one_between_steps_is_right() -> None:
    stock: Any = tiny_model("olmoe")
    want, tokens = logits(stock, prompt(2)), served(continued(stock, prompt(1)), prompt(1))
    model: Any = offload(tiny_model("olmoe"), 0.25)
    found: list[Tensor] = []
    request = Request(
        prompt=prompt(1)[0].tolist(), max_tokens=8, ignore_eos=True,
        on_token=lambda _: found.append(logits(model, prompt(2))),
    )  # fmt: skip
    (result,) = model.expertflow.serve([request])
    assert (list(result.token_ids), result.error) == (tokens, "")
    assert len(found) == 8 and all(torch.allclose(one, want, rtol=0, atol=1e-5) for one in found)
    errors: list[str] = []

    def call(*_: Any) -> None:
        with pytest.raises(ValueError, match="within a step of serve") as caught:
            logits(model, prompt(2))
        errors.append(str(caught.value))

    hook = model.model.layers[1].register_forward_hook(call)
    (result,) = model.expertflow.serve([dataclasses.replace(request, on_token=None)])
    hook.remove()
    assert (list(result.token_ids), result.error) == (tokens, "")
    assert len(errors) == 8


def test_a_call_from_within_an_experts_call_is_refused() -> None:
    model: Any = offload(tiny_model("olmoe"), 0.25)
    activation = model.model.layers[1].mlp.experts.act_fn
    hook = activation.register_forward_hook(lambda *_: logits(model, prompt(2)) and None)
    with pytest.raises(ValueError, match=r"within one of its own experts calls.*serve"):
        logits(model, prompt(1))
    hook.remove()
    assert is_free(model)
    torch.testing.assert_close(
        logits(model, prompt(1)), logits(tiny_model("olmoe"), prompt(1)), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_interleaved_loops_of_one_thread_get_their_own_tokens(
    tiny_predictor: Predictor, tmp_path: Path
) -> None:
    """And the route log tells their sequences apart, or leaves them out."""
    stock: Any = tiny_model("olmoe")
    prompts = [prompt(1, 6), prompt(2, 5), prompt(3, 6)]
    want = [served(continued(stock, ids), ids) for ids in prompts]
    model = offload(
        tiny_model("olmoe"), 0.25, "predicted", predictor=tiny_predictor("olmoe"),
        record=tmp_path / "routes",
    )  # fmt: skip
    states: list[Any] = [None] * 3
    inputs, got = list(prompts), [list[int]() for _ in prompts]
    for _ in range(8):
        for index in range(3):
            output = model(inputs[index], past_key_values=states[index], use_cache=True)
            states[index] = output.past_key_values
            inputs[index] = output.logits[:, -1:].argmax(-1)
            got[index].append(int(inputs[index]))
    assert got == want
    model.expertflow.detach()
    whole = [ids[0].tolist() + tokens for ids, tokens in zip(prompts, want, strict=True)]
    for document in TraceReader(tmp_path / "routes").documents():
        tokens = document.token_ids_T.tolist()
        assert any(tokens == one[: len(tokens)] for one in whole)


def test_two_open_iterators_of_serve_in_one_thread_get_their_own_tokens() -> None:
    stock: Any = tiny_model("olmoe")
    prompts = [prompt(seed) for seed in range(6)]
    want = [served(continued(stock, ids), ids) for ids in prompts]
    engine = offload(tiny_model("olmoe"), 0.25).expertflow

    def serve(numbers: range) -> Any:
        return engine.serve(
            [
                Request(id=str(n), prompt=prompts[n][0].tolist(), max_tokens=8, ignore_eos=True)
                for n in numbers
            ],
            batch=2,
        )

    first, second = serve(range(3)), serve(range(3, 6))
    results = [result for pair in zip(first, second, strict=True) for result in pair]
    assert {result.id: list(result.token_ids) for result in results} == {
        str(number): tokens for number, tokens in enumerate(want)
    }


def test_detaching_within_a_generation_is_refused() -> None:
    model: Any = offload(tiny_model("olmoe"), 0.25)
    hook = model.model.register_forward_hook(lambda *_: model.expertflow.close())
    with pytest.raises(ValueError, match="the model is running"):
        continued(model, prompt(1))
    hook.remove()
    assert is_free(model)
    model.expertflow.close()


def test_coroutines_share_a_model() -> None:
    stock: Any = tiny_model("olmoe")
    want = [continued(stock, prompt(seed)) for seed in range(3)]
    model = offload(tiny_model("olmoe"), 0.25)

    async def run() -> list[Tensor]:
        calls = (asyncio.to_thread(continued, model, prompt(seed)) for seed in range(3))
        return await asyncio.gather(*calls)

    for got, tokens in zip(asyncio.run(run()), want, strict=True):
        assert torch.equal(got, tokens)


# ---------------------------------------------------------------------- the turn comes to an end


def test_a_streamed_generation_that_nobody_reads_to_its_end_lets_others_in() -> None:
    model = offload(tiny_model("olmoe"), 0.25)
    streamer = TextIteratorStreamer(tiny_tokenizer(), timeout=60)
    thread = threading.Thread(target=continued, args=(model, prompt(1)), kwargs={
        "streamer": streamer, "max_new_tokens": 20})  # fmt: skip
    thread.start()
    next(iter(streamer))
    assert is_free(model)
    thread.join()


def test_assisted_generation_is_the_stock_models_beside_others() -> None:
    """The assistant is the model's own copy, offloaded or not."""
    stock: Any = tiny_model("olmoe")
    want = continued(stock, prompt(1))
    model, assistant = offload(tiny_model("olmoe"), 0.25), offload(tiny_model("olmoe"), 0.25)
    runs = [partial(continued, model, prompt(1), assistant_model=assistant)] * 2
    for got in together(*runs, partial(continued, model, prompt(1))):
        assert torch.equal(got, want)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_or_an_interrupt_gives_the_turn_back(error: type[BaseException]) -> None:
    model: Any = offload(tiny_model("olmoe"), 0.25)

    def fail(*_: Any) -> None:
        raise error

    for part in (model.model.layers[1].self_attn, model.model.layers[1].mlp.experts.act_fn):
        hook = part.register_forward_hook(fail)
        for run in (continued, logits):
            with pytest.raises(error):
                run(model, prompt(1))
        hook.remove()
        assert is_free(model)
    assert torch.equal(continued(model, prompt(1)), continued(tiny_model("olmoe"), prompt(1)))


# ---------------------------------------------------------------------- other processes


def test_a_forked_process_is_told_to_load_the_model_itself() -> None:
    """Even where a thread had the turn when the process was forked."""
    model: Any = offload(tiny_model("olmoe"), 0.25)
    reader, writer = multiprocessing.Pipe(duplex=False)
    with model.expertflow.turn():
        child = os.fork()
        if child == 0:  # nothing of the test may run in here
            try:
                for run in (partial(logits, model, prompt(1)), model.expertflow.detach):
                    try:
                        run()
                    except ValueError as error:
                        writer.send(str(error))
            finally:
                os._exit(0)
    os.waitpid(child, 0)
    for _ in range(2):
        assert reader.poll(5) and "runtime.load here" in reader.recv()
    assert is_free(model)


class Prompts(torch.utils.data.Dataset[Tensor]):
    """Knows the model, as data sets do that pad or truncate for it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return prompt(index, min(8, self.model.config.max_position_embeddings))[0]


def test_workers_of_a_data_loader_may_know_the_model() -> None:
    model: Any = offload(tiny_model("olmoe"), 0.25)
    loader = torch.utils.data.DataLoader(
        Prompts(model), num_workers=1, multiprocessing_context="fork"
    )
    for index, ids in enumerate(loader):
        assert torch.equal(ids, prompt(index, 8))
        logits(model, ids)
