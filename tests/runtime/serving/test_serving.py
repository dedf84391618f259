"""Serving together: the same tokens as alone, every request ends once, nothing leaks."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.engine.engine import Engine
from runtime.serving.async_server import AsyncServer
from runtime.serving.request import Delta, Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.serving import SCHEDULERS, SMALL, by_id, greedy, offloaded, prompts
from tests.helpers.tiny import tiny_model, tiny_tokenizer

KINDS = ("olmoe", "mixtral", "qwen3_moe", "gpt_oss")
POOL = prompts(8, 12)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with offloaded(tiny_model("olmoe"), tmp_path_factory.mktemp("serving")) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[tuple[int, ...]]:
    return [greedy(engine.model, prompt, 6) for prompt in POOL]


def requests(count: int, **options: Any) -> list[Request]:
    lengths = np.random.default_rng(5).integers(1, 12, count)
    return [
        Request(id=str(i), prompt=prompt, max_tokens=int(lengths[i]), label=str(i % 3), **options)
        for i, prompt in enumerate(prompts(3, count))
    ]


# ---------------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_each_request_alone(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    asked = requests(10)
    alone = {r.id: greedy(model, r.prompt, r.max_tokens) for r in asked}  # type: ignore[arg-type]
    with offloaded(model, tmp_path) as engine:
        for scheduler in SCHEDULERS if kind == "olmoe" else ("predicted",):
            served = by_id(engine.serve(asked, scheduler=scheduler, **SMALL))
            assert {id: result.token_ids for id, result in served.items()} == alone
        engine.check_integrity()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    scheduler=st.sampled_from(SCHEDULERS),
    batch=st.integers(1, 5),
    parked=st.integers(0, 6),
    chunk=st.integers(1, 30),
    seed=st.integers(0, 2**16),
)
def test_no_grouping_changes_a_token(
    engine: Engine,
    alone: list[tuple[int, ...]],
    scheduler: str,
    batch: int,
    parked: int,
    chunk: int,
    seed: int,
) -> None:
    order = np.random.default_rng(seed).permutation(len(POOL))[:5]
    asked = [Request(id=str(i), prompt=POOL[i], max_tokens=6) for i in order]
    options = {"scheduler": scheduler, "batch": batch, "rows": batch + parked, "chunk": chunk}
    served = by_id(engine.serve(asked, context=64, **options))
    assert {id: result.token_ids for id, result in served.items()} == {
        str(i): alone[i] for i in order
    }


def test_a_sampled_request_gets_the_same_tokens_in_any_company(engine: Engine) -> None:
    sampled = Request(id="it", prompt=[5, 6, 7], max_tokens=12, temperature=0.9, top_p=0.9, seed=11)
    alone = by_id(engine.serve([sampled]))["it"].token_ids
    others = requests(8, temperature=1.5, top_k=20)
    together = by_id(engine.serve([*others[:4], sampled, *others[4:]], **SMALL))["it"].token_ids
    assert together == alone


def test_another_seed_gives_other_tokens(engine: Engine) -> None:
    asked = [Request(prompt=[5, 6], max_tokens=20, temperature=1.0, seed=s) for s in range(4)]
    served = by_id(engine.serve(asked))
    assert len({result.token_ids for result in served.values()}) == 4


def test_without_a_predictor_requests_are_served_first_come_first_served() -> None:
    with offloaded(tiny_model("olmoe")) as engine:
        results = list(engine.serve([Request(prompt=[2], max_tokens=3, id=i) for i in "abcd"]))
        assert [result.id for result in results] == list("abcd")
        with pytest.raises(ValueError, match="needs predictions"):
            engine.serve([], scheduler="predicted")


def test_the_model_generates_as_before_while_and_after_serving(engine: Engine) -> None:
    before = greedy(engine.model, [9, 8, 7], 8)
    serving = engine.serve(requests(6), **SMALL)
    next(serving)
    assert greedy(engine.model, [9, 8, 7], 8) == before
    list(serving)
    assert greedy(engine.model, [9, 8, 7], 8) == before


# ---------------------------------------------------------------------- ends


def test_a_request_ends_at_the_end_of_sequence_token_unless_told_to_go_on(engine: Engine) -> None:
    asked = Request(id="it", prompt=[5, 6, 7], max_tokens=40, ignore_eos=True)
    through = by_id(engine.serve([asked]))["it"].token_ids
    assert len(through) == 40
    before = engine.model.generation_config.eos_token_id  # type: ignore[union-attr]
    engine.model.generation_config.eos_token_id = through[4]  # type: ignore[union-attr]
    try:
        ended = by_id(engine.serve([Request(id="it", prompt=[5, 6, 7], max_tokens=40)]))["it"]
    finally:
        engine.model.generation_config.eos_token_id = before  # type: ignore[union-attr]
    assert ended.finish == "stop"
    assert ended.token_ids == through[: through.index(through[4]) + 1]


def test_bad_requests_end_with_a_reason_and_leave_the_others_alone(engine: Engine) -> None:
    bad = {
        "empty": Request(id="empty", prompt=[]),
        "long": Request(id="long", prompt=[2] * 60, max_tokens=5),
        "vocab": Request(id="vocab", prompt=[256]),
        "text": Request(id="text", prompt="no tokenizer"),
    }
    good = requests(3)
    served = by_id(engine.serve([*good, *bad.values()], **SMALL))
    reasons = {id: served[id].error for id in bad}
    assert [word in reasons[id] for id, word in zip(bad, BAD_WORDS, strict=True)] == [True] * 4
    assert all(served[request.id].finish in ("length", "stop") for request in good)


BAD_WORDS = ("is empty", "context of 64", "outside 0 to 255", "tokenizer=")


def test_two_requests_in_flight_cannot_share_an_id(engine: Engine) -> None:
    loop = ServingLoop(engine, None, ServeSettings(**SMALL))
    for _ in range(2):
        loop.submit(Request(id="same", prompt=[2], max_tokens=2))
    assert [(r.finish, "in flight already" in r.error) for r in loop.step()] == [("error", True)]


def test_a_failing_callback_ends_only_its_own_request(engine: Engine) -> None:
    def fail(delta: Delta) -> None:
        raise RuntimeError("the reader is gone")

    asked = [Request(id="bad", prompt=[3], max_tokens=9, on_token=fail), *requests(4)]
    served = by_id(engine.serve(asked, **SMALL))
    assert (served["bad"].finish, served["bad"].error) == (
        "error",
        "RuntimeError: the reader is gone",
    )
    assert all(served[str(i)].finish != "error" for i in range(4))


def test_a_cancelled_request_ends_as_such_wherever_it_is(engine: Engine) -> None:
    loop = ServingLoop(engine, None, ServeSettings(**(SMALL | {"batch": 2, "rows": 2})))
    for name in ("active", "other", "waiting"):
        loop.submit(Request(id=name, prompt=[2, 3], max_tokens=50, ignore_eos=True))
    for _ in range(3):
        assert loop.step() == []
    assert [sequence.request.id for sequence in loop.waiting] == ["waiting"]
    for name in ("active", "waiting", "unknown"):
        loop.cancel(name)
    assert {(r.id, r.finish) for r in loop.step()} == {
        ("active", "cancelled"),
        ("waiting", "cancelled"),
    }
    assert [result.id for result in loop.cancel_all()] == ["other"]
    assert loop.is_idle


def test_two_thousand_requests_with_cancels_and_misfits_each_end_once(engine: Engine) -> None:
    random = np.random.default_rng(1)
    options = SMALL | {"scheduler": "predicted", "batch": 16, "rows": 32, "chunk": 64}
    loop = ServingLoop(engine, None, ServeSettings(**options))
    ended: Counter[str] = Counter()
    sent, finishes = 0, Counter[str]()
    while sent < 2000 or not loop.is_idle:
        for _ in range(min(int(random.integers(0, 40)), 2000 - sent)):
            length = 80 if random.random() < 0.1 else int(random.integers(1, 6))
            loop.submit(Request(id=str(sent), prompt=[7] * length, max_tokens=1 + sent % 3))
            sent += 1
        loop.cancel(str(random.integers(0, sent + 1)))
        for result in loop.step():
            ended[result.id] += 1
            finishes[result.finish] += 1
    assert len(ended) == 2000 and set(ended.values()) == {1}
    assert loop.finished == finishes and min(finishes.values()) > 0
    assert loop._cache.num_free == 32 and not (loop.waiting or loop.active)
    engine.check_integrity()


# ---------------------------------------------------------------------- text


def test_streamed_pieces_are_the_text_and_stop_before_the_stop_string(engine: Engine) -> None:
    tokenizer = tiny_tokenizer()
    whole = by_id(
        engine.serve(
            [Request(id="it", prompt="ab", max_tokens=30, ignore_eos=True)], tokenizer=tokenizer
        )
    )["it"]
    stop = whole.text[10:13]
    pieces: list[Delta] = []
    asked = Request(
        id="it",
        prompt="ab",
        max_tokens=30,
        ignore_eos=True,
        stop=("never", stop),
        on_token=pieces.append,
    )
    result = by_id(engine.serve([asked], tokenizer=tokenizer))["it"]
    assert result.finish == "stop"
    assert result.text == whole.text[: whole.text.index(stop)]
    assert "".join(piece.text for piece in pieces) == result.text
    assert [piece.token_id for piece in pieces] == list(result.token_ids)


# ---------------------------------------------------------------------- ways in


def test_requests_may_come_through_a_queue_while_others_run(engine: Engine) -> None:
    queue: Queue[Request | None] = Queue()
    serving = engine.serve(queue, **SMALL)
    queue.put(Request(id="first", prompt=[2], max_tokens=2))
    assert next(serving).id == "first"

    def later() -> None:
        queue.put(Request(id="second", prompt=[3], max_tokens=2))
        queue.put(None)

    threading.Timer(0.05, later).start()
    assert [result.id for result in serving] == ["second"]


def test_an_iterable_is_only_read_as_far_as_admission_looks(engine: Engine) -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Request(prompt=[2], max_tokens=2)

    next(engine.serve(endless(), **SMALL))
    assert taken < 40


def test_coroutines_are_served_together(engine: Engine) -> None:
    asked = requests(8)

    async def main() -> dict[str, Result]:
        async with AsyncServer(engine, **SMALL) as server:
            return {result.id: result async for result in server.serve(asked)}

    served = asyncio.run(main())
    for request in asked:
        alone = greedy(engine.model, request.prompt, request.max_tokens)  # type: ignore[arg-type]
        assert served[request.id].token_ids == alone


def test_closing_a_stream_cancels_its_request(engine: Engine) -> None:
    async def main() -> Counter[Any]:
        async with AsyncServer(engine, **SMALL) as server:
            stream: Any = server.stream(Request(prompt=[2], max_tokens=50, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()
            await server.complete(Request(prompt=[3], max_tokens=2))
            return server.loop.finished

    assert asyncio.run(main())["cancelled"] == 1


def test_leaving_the_server_cancels_what_is_in_flight(engine: Engine) -> None:
    async def main() -> Result:
        async with AsyncServer(engine, **SMALL) as server:
            asked = Request(prompt=[2], max_tokens=60, ignore_eos=True)
            task = asyncio.create_task(server.complete(asked))
            while server.loop.num_steps < 2:
                await asyncio.sleep(0.001)
        return await task

    assert asyncio.run(main()).finish == "cancelled"


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_a_sequence_that_becomes_nan_ends_alone_and_says_so(options: dict[str, Any]) -> None:
    model: Any = tiny_model("olmoe")
    asked = [Request(id=str(i), prompt=[i + 2, 9], max_tokens=4, **options) for i in range(3)]
    with offloaded(model) as engine, torch.no_grad():
        sound = by_id(engine.serve(asked, **SMALL))
        model.get_input_embeddings().weight[3] = torch.nan
        served = by_id(engine.serve(asked, **SMALL))
    assert served["1"].finish == "error"
    assert "logits are NaN" in served["1"].error
    assert all(served[id].token_ids == sound[id].token_ids for id in ("0", "2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "best"}, "not one of fifo"),
        ({"batch": 0}, "at least 1"),
        ({"batch": 9, "rows": 8}, "raise rows"),
        ({"max_skips": -1}, "negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeSettings(**options)


def test_an_encoder_decoder_model_is_refused() -> None:
    with (
        offloaded(tiny_model("switch_transformers")) as engine,
        pytest.raises(ValueError, match="encoder-decoder"),
    ):
        engine.serve([])


def test_serving_leaves_no_gradient_graph(engine: Engine) -> None:
    loop = ServingLoop(engine, None, ServeSettings(**SMALL))
    loop.submit(Request(prompt=[2, 3], max_tokens=2))
    loop.step()
    keys = getattr(loop._cache.layers[0], "keys", None)
    assert isinstance(keys, torch.Tensor) and not keys.requires_grad


def test_steps_of_others_touch_no_byte_of_a_parked_sequence(engine: Engine) -> None:
    options = SMALL | {"scheduler": "domain-oracle", "batch": 1, "rows": 3}
    loop = ServingLoop(engine, None, ServeSettings(**options))
    for i in range(3):
        loop.submit(Request(id=str(i), prompt=[5 + i] * 4, max_tokens=30, ignore_eos=True))
    for _ in range(4):
        loop.step()
    assert sum(sequence.is_ready for sequence in loop.active) == 3
    before = [_row(loop, sequence.row) for sequence in loop.active]
    lengths = [sequence.num_cached for sequence in loop.active]
    for _ in range(2):
        loop.step()
    ran = 0
    for sequence, (place, keys), length in zip(loop.active, before, lengths, strict=True):
        place_after, keys_after = _row(loop, sequence.row)
        assert place_after == place
        assert torch.equal(keys_after[:, :length], keys[:, :length])
        ran += sequence.num_cached - length
    assert ran == 2


def _row(loop: ServingLoop, row: int) -> tuple[int, torch.Tensor]:
    keys: torch.Tensor = getattr(loop._cache.layers[1], "keys")  # noqa: B009 - not on every layer
    return keys[row].data_ptr(), keys[row].clone()


# ---------------------------------------------------------------------- one among others


BAD_PROMPTS: list[Any] = ["\ud800", "a\udfffb", None, 5, ["x"], [1.5, None], [2**70], [-1], ""]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=repr)
def test_a_prompt_that_cannot_be_encoded_ends_its_own_request_only(
    prompt: Any, tmp_path: Path
) -> None:
    model: Any = tiny_model("olmoe")
    good = [Request(id=str(i), prompt=p, max_tokens=4) for i, p in enumerate(prompts(7, 2))]
    alone = {r.id: greedy(model, r.prompt, 4) for r in good}  # type: ignore[arg-type]
    asked = [good[0], Request(id="bad", prompt=prompt, max_tokens=4), good[1]]
    with offloaded(model, tmp_path, memory=0.5) as engine:
        served = by_id(engine.serve(asked, tokenizer=tiny_tokenizer(), **SMALL))
    assert served["bad"].finish == "error" and "prompt" in served["bad"].error
    assert {id: served[id].token_ids for id in alone} == alone


class Breaking:
    """A tokenizer that raises what nobody expects of one."""

    def __call__(self, text: str) -> Any:
        raise KeyError(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(tiny_tokenizer(), name)


def test_an_unforeseen_error_of_a_tokenizer_ends_its_own_request_only(tmp_path: Path) -> None:
    model: Any = tiny_model("olmoe")
    good = Request(id="good", prompt=[3, 4], max_tokens=4)
    alone = greedy(model, good.prompt, 4)  # type: ignore[arg-type]
    with offloaded(model, tmp_path, memory=0.5) as engine:
        asked = [Request(id="bad", prompt="text"), good]
        served = by_id(engine.serve(asked, tokenizer=Breaking(), **SMALL))
    assert served["bad"].error == "KeyError: 'text'"
    assert served["good"].token_ids == alone


def test_whole_numbers_will_do_where_fractions_are_meant(tmp_path: Path) -> None:
    with offloaded(tiny_model("olmoe"), tmp_path, memory=0.5) as engine:
        whole = Request(id="whole", prompt=[3, 4], max_tokens=4, temperature=1, top_p=1, seed=7)
        exact = Request(id="exact", prompt=[3, 4], max_tokens=4, temperature=1.0, seed=7)
        served = by_id(engine.serve([whole, exact], **SMALL))
    assert served["whole"].finish != "error"
    assert served["whole"].token_ids == served["exact"].token_ids


def test_a_stop_string_by_itself_is_one_stop_string() -> None:
    assert Request(prompt=[1], stop="the").stop == ("the",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", 5), ("stop", [5]), ("temperature", "hot"), ("temperature", None),
        ("temperature", float("nan")), ("top_p", True), ("max_tokens", 1.5), ("max_tokens", "9"),
        ("seed", "x"), ("top_k", None), ("logprobs", 1.5), ("priority", "first"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        Request(prompt=[1], **{field: value})
