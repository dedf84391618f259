"""One request never ends the others, and a step that fails ends only those that it must."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runtime
from runtime.engine.engine import Engine
from runtime.serving.request import Request, Result
from runtime.serving.sequence import ServedSequence
from runtime.serving.serve import run
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.breaking import ERRORS, POISON, Breaking, Panic, drain, poison
from tests.helpers.serving import SCHEDULERS, SMALL, by_id, greedy, offloaded, prompts
from tests.helpers.tiny import tiny_model, tiny_tokenizer

POOL = prompts(8, 6)
ALL = ServeSettings(**SMALL)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with offloaded(tiny_model("olmoe"), tmp_path_factory.mktemp("failures")) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[tuple[int, ...]]:
    return [greedy(engine.model, prompt, 6) for prompt in POOL]


def good(count: int = 3) -> list[Request]:
    return [Request(id=str(i), prompt=POOL[i], max_tokens=6) for i in range(count)]


def assert_served(served: dict[str, Result], alone: list[tuple[int, ...]], count: int = 3) -> None:
    for i in range(count):
        assert served[str(i)].token_ids == alone[i]
        assert served[str(i)].fault == ""


# ---------------------------------------------------------------------- a request's own errors


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_tokenizer_raises_is_the_error_of_its_own_request(
    error: BaseException, engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    first, *rest = good()
    asked = [first, Request(id="bad", prompt="bad"), *rest]
    tokenizer = Breaking(error, lambda given: given == "bad")
    served = by_id(engine.serve(asked, tokenizer=tokenizer, **SMALL))
    assert served["bad"].finish == "error" and served["bad"].error.isprintable()
    assert served["bad"].fault == (
        "server" if isinstance(error, OSError | MemoryError) else "request"
    )
    assert_served(served, alone)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_turning_tokens_into_text_raises_ends_its_own_request_only(
    error: BaseException, engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    broken = alone[1][2]
    assert all(broken not in alone[i] for i in (0, 2))
    tokenizer = Breaking(error, lambda given: broken in given)
    served = by_id(engine.serve(good(), tokenizer=tokenizer, **SMALL))
    assert (served["1"].finish, served["1"].fault) == ("error", "server")
    assert served["1"].token_ids == alone[1][:3]
    assert served["0"].token_ids == alone[0] and served["2"].token_ids == alone[2]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_streaming_callback_raises_ends_its_own_request_only(
    error: BaseException, engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    def fail(_: object) -> None:
        raise error

    asked = [Request(id="bad", prompt=[3], max_tokens=9, on_token=fail), *good()]
    served = by_id(engine.serve(asked, **SMALL))
    assert served["bad"].finish == "error"
    assert_served(served, alone)


@pytest.mark.parametrize("prompt", [[10**5000], [[[]]], {"a": 1}, object(), [2**63]])
def test_a_prompt_of_any_kind_is_refused_in_words(prompt: Any, engine: Engine) -> None:
    (result,) = engine.serve([Request(prompt=prompt)], tokenizer=tiny_tokenizer(), **SMALL)
    assert (result.finish, result.fault) == ("error", "request")
    assert "the prompt" in result.error and len(result.error) < 700


def test_what_is_no_request_is_refused_where_it_is_handed_over(engine: Engine) -> None:
    loop = ServingLoop(engine, None, ALL)
    for item in ("text", {"prompt": [3]}, None):
        with pytest.raises(ValueError, match="is not a Request"):
            loop.submit(item)  # type: ignore[arg-type]


def test_a_result_that_cannot_be_made_is_an_error_not_a_silence(
    engine: Engine, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ServedSequence.result

    def failing(sequence: ServedSequence, *args: Any) -> Result:
        return raise_(KeyError("text")) if sequence.request.id == "bad" else result(sequence, *args)

    monkeypatch.setattr(ServedSequence, "result", failing)
    served = by_id(engine.serve([Request(id="bad", prompt=[3], max_tokens=2), *good()], **SMALL))
    assert (served["bad"].error, served["bad"].fault) == ("KeyError: 'text'", "server")
    assert_served(served, alone)


def test_an_interrupt_is_nobodys_own_error(engine: Engine) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(engine.serve([Request(prompt=[3], max_tokens=4, on_token=interrupt)], **SMALL))


# ---------------------------------------------------------------------- steps that fail


def test_a_request_that_no_step_survives_ends_by_itself(
    engine: Engine, alone: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    loop = ServingLoop(engine, None, ALL)
    poison(loop)
    first, *rest = good()
    for request in (first, Request(id="bad", prompt=[9, 8], max_tokens=4, label=POISON), *rest):
        loop.submit(request)
    served = drain(loop)
    assert (served["bad"].error, served["bad"].fault) == ("RuntimeError: out of memory", "server")
    assert_served(served, alone)
    assert loop.failure == "" and loop.num_failed_steps >= 1
    assert loop._cache.num_free == loop._cache.num_rows
    assert any(record.exc_info and "step" in record.message for record in caplog.records)


def test_requests_after_a_step_that_failed_are_served(
    engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    loop = ServingLoop(engine, None, ALL)
    poison(loop)
    for _ in range(3):
        loop.submit(Request(id="bad", prompt=[9, 8], max_tokens=4, label=POISON))
        assert drain(loop)["bad"].finish == "error"
    for request in good():
        loop.submit(request)
    assert_served(drain(loop), alone)


@pytest.mark.parametrize(("failures", "lost"), [(1, 0), (2, 1), (40, 3)])
def test_a_disk_that_fails_for_a_while_leaves_a_consistent_cache(
    failures: int, lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model("olmoe")
    alone = [greedy(model, prompt, 6) for prompt in POOL]
    with offloaded(model, tmp_path, memory=0.25) as engine:
        loop = ServingLoop(engine, None, ALL)
        store: Any = engine._backend.pools[0]._store  # type: ignore[attr-defined]
        read, left = store.read, [failures]

        def flaky(*args: Any) -> None:
            left[0] -= 1
            if left[0] >= 0:
                raise OSError("the disk is gone")
            read(*args)

        monkeypatch.setattr(store, "read", flaky)
        for request in good():
            loop.submit(request)
        served = drain(loop)
        engine.check_integrity()
        ended = [result for result in served.values() if result.finish == "error"]
        assert len(ended) == lost
        assert all(result.error == "OSError: the disk is gone" for result in ended)
        left[0] = 0
        for request in good():
            loop.submit(request)
        assert_served(drain(loop), alone)


def test_an_engine_beyond_repair_refuses_with_the_reason(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = ServingLoop(engine, None, ALL)
    poison(loop)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for request in (
        *good(5),
        Request(id="bad", prompt=[9, 8], max_tokens=4, label=POISON, priority=1),
    ):
        loop.submit(request)
    monkeypatch.setattr(engine, "check_integrity", lost)
    served = drain(loop)
    assert {result.finish for result in served.values()} == {"error"}
    assert {result.fault for result in served.values()} == {"server"}
    assert "illegal memory access" in loop.failure
    loop.submit(Request(id="late", prompt=[3], max_tokens=4))
    assert "illegal memory access" in drain(loop)["late"].error


def test_serving_an_iterable_ends_where_the_engine_cannot_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = ServingLoop(engine, None, ALL)
    poison(loop)
    monkeypatch.setattr(engine, "check_integrity", lambda: 1 / 0)
    asked = iter(Request(prompt=[3], max_tokens=4, label=POISON) for _ in iter(int, 1))
    results: list[Result] = []
    with pytest.raises(RuntimeError, match="no request can be served any more"):
        results.extend(run(loop, asked, 5))
    assert len(results) == 5


def test_a_failure_before_the_step_ends_those_in_flight_then_all(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, alone: list[tuple[int, ...]]
) -> None:
    loop = ServingLoop(engine, None, ServeSettings(**SMALL | {"batch": 2, "rows": 2}))
    for request in good(5):
        loop.submit(request)
    assert loop.step() == [] and loop.waiting
    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "resident_LE", property(lambda _: 1 / 0))
        assert {result.id for result in loop.step()} == {"0", "1"}
    assert_served(drain(loop) | {}, alone, 0)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "resident_LE", property(lambda _: 1 / 0))
        for request in good(5):
            loop.submit(request)
        assert len(drain(loop, 3)) == 5
    for request in good():
        loop.submit(request)
    assert_served(drain(loop), alone)


# ---------------------------------------------------------------------- what is not needed


@pytest.mark.parametrize("after", [0, 3, 9])
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, None])
def test_a_predictor_that_fails_is_dropped_and_no_request_notices(
    scheduler: str | None, after: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = tiny_model("olmoe")
    alone = [greedy(model, prompt, 6) for prompt in POOL]
    with offloaded(model, tmp_path) as engine:
        loop = ServingLoop(engine, None, ServeSettings(scheduler=scheduler, **SMALL))
        forecaster: Any = loop._forecasting._forecaster
        session = forecaster.file.session

        class Failing:
            left = after

            def run(self, *args: Any) -> Any:
                self.left -= 1
                if self.left < 0:
                    raise RuntimeError("bad allocation")
                return session.run(*args)

        forecaster.file = forecaster.file._replace(session=Failing())
        for request in good(6):
            loop.submit(request)
        assert_served(drain(loop), alone, 6)
    assert not loop._forecasting.is_on
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "goes on without" in warned[0].message


def test_an_ordering_that_fails_gives_way_to_first_come_first_served(
    engine: Engine, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = ServingLoop(engine, None, ServeSettings(scheduler="predicted", **SMALL))
    monkeypatch.setattr(loop.scheduler.ordering, "compose", lambda *_: 1 / 0)
    for request in good(6):
        loop.submit(request)
    assert_served(drain(loop), alone, 6)
    assert loop.scheduler.ordering.name == "fifo"


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("bug")], ids=repr)
def test_a_route_log_that_fails_ends_no_request(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model("olmoe")
    alone = [greedy(model, prompt, 6) for prompt in POOL]
    loaded = runtime.load(model, memory=0.5, record=tmp_path / "log")
    with loaded.expertflow as engine:
        monkeypatch.setattr(engine.route_log, "add", lambda *_: raise_(error))
        assert_served(by_id(engine.serve(good(), **SMALL)), alone)


def raise_(error: Exception) -> NoReturn:
    raise error


# ---------------------------------------------------------------------- where requests come from


def test_requests_in_flight_are_delivered_before_their_iterator_raises(
    engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    def failing() -> Iterator[Request]:
        yield from good()
        raise OSError("the data set is gone")

    served: list[Result] = []
    with pytest.raises(OSError, match="the data set is gone"):
        served.extend(engine.serve(failing(), **SMALL))
    assert_served(by_id(iter(served)), alone)


def test_what_is_no_request_in_a_queue_is_refused_beside_the_others(
    engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    queue: Queue[Any] = Queue()
    for item in (*good(), 5, None):
        queue.put(item)
    with pytest.warns(UserWarning, match="is no request"):
        served = list(engine.serve(queue, **SMALL))
    (refused,) = [result for result in served if result.finish == "error"]
    assert "is no request" in refused.error and refused.fault == "request"
    assert_served(by_id(result for result in served if result.finish != "error"), alone)


# ---------------------------------------------------------------------- all together


def bad_request(kind: int, id: str) -> Request:
    """One of several kinds of requests that end with an error."""

    def fail(_: object) -> None:
        raise Panic("callback")

    options: list[dict[str, Any]] = [
        {"prompt": "bad"}, {"prompt": [2**70]}, {"prompt": [2] * 90}, {"prompt": []},
        {"prompt": [5, 6], "on_token": fail}, {"prompt": [7, 8, 9], "label": POISON},
        {"prompt": "ab \ud800"},
    ]  # fmt: skip
    return Request(id=id, max_tokens=5, **options[kind % len(options)])


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**16),
    scheduler=st.sampled_from(SCHEDULERS),
    kinds=st.lists(st.integers(0, 6), min_size=1, max_size=10),
    reuse=st.booleans(),
)
def test_good_requests_stay_bit_identical_among_bad_ones_and_cancels(
    engine: Engine,
    alone: list[tuple[int, ...]],
    seed: int,
    scheduler: str,
    kinds: list[int],
    reuse: bool,
) -> None:
    random = np.random.default_rng(seed)
    options = SMALL | {"scheduler": scheduler, "prefix_reuse": reuse}
    tokenizer = Breaking(Panic("unwrap"), lambda given: given == "bad")
    loop = ServingLoop(engine, tokenizer, ServeSettings(**options))
    poison(loop)
    groups = ["", "", "a", "b"]
    asked = [
        Request(id=str(i), prompt=POOL[i], max_tokens=6, group=groups[random.integers(4)])
        for i in range(6)
    ]
    asked += [bad_request(kind, f"bad-{i}") for i, kind in enumerate(kinds)]
    asked += [
        Request(id=f"cancelled-{i}", prompt=POOL[i % 6], max_tokens=30, ignore_eos=True, group="a")
        for i in range(4)
    ]
    served: dict[str, Result] = {}
    order = random.permutation(len(asked)).tolist()
    for _ in range(500):
        for _ in range(random.integers(0, 4)):
            if order:
                loop.submit(asked[order.pop()])
        if random.random() < 0.5 or not order:
            loop.cancel(f"cancelled-{random.integers(4)}")
        served |= {result.id: result for result in loop.step()}
        if loop.is_idle and not order:
            break
    assert len(served) == len(asked)
    assert_served(served, alone, 6)
    assert all(result.finish == "error" for id, result in served.items() if "bad" in id)
    assert loop._cache.num_free == loop._cache.num_rows and loop._rows.num_parked == 0
    engine.check_integrity()
