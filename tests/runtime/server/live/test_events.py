"""The stream of events about the steps: what it says, what it costs, who may have it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

import runtime
from runtime.engine.engine import Engine
from runtime.server.live import feed as feeds
from runtime.serving.request import Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from runtime.serving.steps.watch import Sighting
from tests.helpers.event_stream import EVENTS, flags, watching
from tests.helpers.http_server import running
from tests.helpers.serving import offloaded
from tests.helpers.tiny import tiny_model, tiny_tokenizer

ASKED = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several events within the short texts of a tiny model."""
    monkeypatch.setattr(feeds, "INTERVAL_ON_CPU", 0.2)


def complete(address: str, **fields: Any) -> None:
    httpx.post(f"{address}/v1/completions", json=ASKED | fields, timeout=60).raise_for_status()


def steps_of(address: str, *, num_tokens: int) -> list[dict[str, Any]]:
    """The events of one completion."""
    with watching(address) as events, ThreadPoolExecutor(1) as pool:
        next(events)
        asked = pool.submit(complete, address, max_tokens=num_tokens)
        steps = [
            data for _, data in takewhile(lambda event: not is_last(event[1], num_tokens), events)
        ]
        asked.result()
    return steps


def is_last(data: dict[str, Any], num_tokens: int) -> bool:
    """Whether all tokens but the newest have run."""
    return bool(data["counts"]["tokens"] >= num_tokens - 2)


def test_the_first_event_describes_the_model_and_its_cache(address: str, engine: Engine) -> None:
    stack, stats = engine.topology.stack(), engine.stats()
    with watching(address) as events:
        name, about = next(events)
    assert name == "topology"
    assert about["model"] == "tiny"
    assert (about["layers"], about["experts"]) == (stack.num_layers, stack.num_experts)
    assert (about["top_k"], about["slots"]) == (stack.top_k, stats.num_slots)
    assert about["policy"] == stats.policy
    assert about["predictor"] is True
    assert about["chat"] is True
    assert about["expert_bytes"] > 0


def test_a_step_names_the_experts_it_used_and_which_of_them_were_there(
    address: str, engine: Engine
) -> None:
    stack = engine.topology.stack()
    shape = stack.num_layers, stack.num_experts
    steps = steps_of(address, num_tokens=120)
    assert len(steps) > 2
    for step in (step for step in steps if step["decoded"] == 1 and step["sequences"] == 1):
        hit, missed = flags(step["hit"], shape), flags(step["missed"], shape)
        residents = flags(step["residents"], shape)
        assert (hit & missed).sum() == 0
        assert (hit <= residents).all()
        assert not (missed & residents).any()
        assert ((hit | missed).sum(axis=1) == stack.top_k).all()
        assert (flags(step["predicted"], shape).sum(axis=1) == stack.top_k).all()
        assert residents.sum() <= engine.stats().num_slots


def test_counts_only_grow_and_events_come_at_most_five_times_a_second(address: str) -> None:
    began = time.monotonic()
    steps = steps_of(address, num_tokens=120)
    assert len(steps) <= 5 * (time.monotonic() - began) + 1
    for name in steps[0]["counts"]:
        counts = [step["counts"][name] for step in steps]
        assert counts == sorted(counts), name
    assert [step["step"] for step in steps] == sorted({step["step"] for step in steps})


def test_under_lru_the_shadow_counts_what_the_cache_counts() -> None:
    model = runtime.load(tiny_model("olmoe"), memory=0.5, policy="lru")
    with model.expertflow as engine, running(engine) as address:
        steps = steps_of(address, num_tokens=60)
    counts = steps[-1]["counts"]
    assert counts["misses"] > 0
    assert (counts["lru_hits"], counts["lru_misses"]) == (counts["hits"], counts["misses"])
    assert counts["lru_bytes"] == counts["bytes"]


def test_routes_are_seen_without_a_predictor_while_somebody_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds, "INTERVAL_ON_CPU", 0.02)  # 40 tokens may take less than 0.2 seconds
    with offloaded(tiny_model("olmoe")) as engine, running(engine) as address:
        steps = steps_of(address, num_tokens=40)
        assert steps[-1]["predicted"] is None
        assert steps[-1]["recall"] is None
        wait_until(lambda: not engine.watchers)


def test_nothing_is_observed_once_nobody_watches(engine: Engine) -> None:
    with running(engine) as address:
        with ExitStack() as stack:
            streams = [stack.enter_context(watching(address)) for _ in range(3)]
            assert [next(stream)[0] for stream in streams] == ["topology"] * 3
            assert engine.watchers
        wait_until(lambda: not engine.watchers)
        complete(address)


def test_a_stream_can_be_taken_up_again_while_steps_run(address: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete, address, max_tokens=180)
        for _ in range(3):
            with watching(address) as events:
                assert next(events)[0] == "topology"
                assert next(events)[0] == "step"
        asked.result()


def test_the_stream_asks_for_the_token_and_the_page_does_not(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret\n")
    with running(engine, token_file=tmp_path / "token") as address:
        assert httpx.get(address + EVENTS).status_code == 401
        with watching(address, Authorization="Bearer secret") as events:
            assert next(events)[0] == "topology"
        assert httpx.get(address).status_code == 200
        assert httpx.get(f"{address}/page/app.js").status_code == 200
        assert httpx.get(f"{address}/page/../v1/models").status_code == 401


def test_too_many_watchers_are_turned_away(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MOST_WATCHERS", 1)
    with watching(address) as events:
        next(events)
        assert httpx.get(address + EVENTS).status_code == 429


def test_a_server_that_is_told_to_stop_ends_its_streams(engine: Engine) -> None:
    with ExitStack() as stack:
        with running(engine, grace=10) as address:
            events = stack.enter_context(watching(address))
            next(events)
            began = time.monotonic()
        assert time.monotonic() - began < 5
        assert list(events) == []


def test_a_watcher_that_fails_stops_no_step(engine: Engine) -> None:
    seen: list[Sighting] = []

    def fail(sighting: Sighting) -> None:
        seen.append(sighting)
        raise RuntimeError("no more")

    loop = ServingLoop(engine, tiny_tokenizer(), ServeSettings(batch=2, context=64))
    loop.watch.watcher = fail
    loop.submit(Request(prompt=[1, 2, 3], max_tokens=6, ignore_eos=True))
    results: list[Result] = []
    while not results:
        results += loop.step()
    assert results[0].finish == "length"
    assert len(seen) == 1
    assert not loop.watch.is_watched
    assert seen[0].routes_TLK.shape[0] == 3
    assert np.isin(seen[0].missing_LE, (0, 1)).all()


def wait_until(is_so: Any) -> None:
    until = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)
