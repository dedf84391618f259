"""Served sequences whose keys and values lie in pages, fewer than all of them may come to need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.engine.engine import Engine
from runtime.kv.pages import places
from runtime.serving.request import Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.breaking import drain
from tests.helpers.serving import SCHEDULERS, greedy, offloaded, prompts
from tests.helpers.tiny import tiny_model

PAGE, CONTEXT = 4, 48
OPTIONS: dict[str, Any] = {
    "batch": 4, "rows": 6, "context": CONTEXT, "chunk": 16, "cache_tokens": CONTEXT + PAGE,
}  # fmt: skip
POOL = prompts(5, 6, 20)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PAGE", PAGE)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with offloaded(tiny_model("olmoe"), tmp_path_factory.mktemp("pages")) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[tuple[int, ...]]:
    """What each prompt of the pool goes on with by itself."""
    return [whole(engine, prompt) for prompt in POOL]


def whole(engine: Engine, prompt: list[int], max_tokens: int = 18) -> tuple[int, ...]:
    """What a prompt goes on with by itself, over one whole row."""
    request = Request(id="it", prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
    (result,) = engine.serve([request], context=CONTEXT, rows=1, batch=1)
    return result.token_ids


def loop_of(engine: Engine, **options: Any) -> ServingLoop:
    return ServingLoop(engine, None, ServeSettings(**OPTIONS | options))


def asked(index: int, **options: Any) -> Request:
    options = {"max_tokens": 18, "ignore_eos": True} | options
    return Request(id=str(index), prompt=POOL[index], **options)


def check(loop: ServingLoop) -> None:
    """Every page is free, or has one owner: a sequence in flight, or a row that is remembered."""
    pages = loop._cache.pages
    assert pages is not None
    rows = {one.row for one in loop.active} | set(loop._rows._held)
    owned = [page for row in range(loop._cache.num_rows) for page in pages.of(row)]
    assert len(set(owned)) == len(owned) == pages.num_pages - pages.num_free
    assert all(row in rows for row in range(loop._cache.num_rows) if pages.of(row))
    for one in loop.active:
        assert len(pages.of(one.row)) >= pages.count(one.num_cached)


def served(loop: ServingLoop) -> dict[str, Result]:
    found: dict[str, Result] = {}
    while not loop.is_idle:
        found |= {result.id: result for result in loop.step()}
        check(loop)
    return found


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_tokens_are_those_of_each_request_alone_where_pages_run_out(
    scheduler: str, engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    loop = loop_of(engine, scheduler=scheduler)
    for index in range(len(POOL)):
        loop.submit(asked(index))
    found = served(loop)
    assert [found[str(index)].token_ids for index in range(len(POOL))] == alone
    assert loop.num_displaced > 0
    assert loop._rows.num_parked == 0
    pages = loop._cache.pages
    assert pages is not None
    assert pages.num_free == pages.num_pages


def test_the_newest_of_the_lowest_priority_gives_way_and_goes_on_before_others_begin(
    engine: Engine,
) -> None:
    loop = loop_of(engine, scheduler="fifo", cache_tokens=CONTEXT)
    ids = [[7] * 8, [9] * 8, [11] * 8, [5] * 8]
    for index, priority in enumerate((0, 0, 1)):
        loop.submit(Request(id=str(index), prompt=ids[index], max_tokens=30, ignore_eos=True,
                            priority=priority))  # fmt: skip
    loop.step()
    assert len(loop.active) == 3
    loop.submit(Request(id="3", prompt=ids[3], max_tokens=4, ignore_eos=True))
    parked: list[str] = []
    while not loop.is_idle:
        loop.step()
        now = {one.request.id for one in loop._rows._parked}
        assert not (now and any(one.request.id == "3" for one in loop.active))
        parked += sorted(now)
    assert parked[0] == "1"
    assert set(parked) <= {"0", "1"}


def test_admission_leaves_everyone_a_next_page(engine: Engine) -> None:
    """As long as all are short, nobody is parked."""
    loop = loop_of(engine, scheduler="fifo", rows=6, batch=6)
    for index in range(len(POOL)):
        loop.submit(asked(index, max_tokens=PAGE))
    found = served(loop)
    assert len(found) == len(POOL)
    assert loop.num_displaced == 0


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_sliding_windows_lie_in_pages_too(kind: str) -> None:
    model: Any = tiny_model(kind, **({"sliding_window": 5} if kind == "mixtral" else {}))
    expected = [greedy(model, prompt, 12) for prompt in POOL[:4]]
    with offloaded(model) as engine:
        loop = loop_of(engine)
        for index in range(4):
            loop.submit(asked(index, max_tokens=12, ignore_eos=False))
        found = served(loop)
    assert [found[str(index)].token_ids for index in range(4)] == expected


def test_choices_of_one_prompt_run_it_once(engine: Engine) -> None:
    loop = loop_of(engine, scheduler="fifo")
    prompt = list(range(20, 33))
    expected = whole(engine, prompt, 16)
    for index in range(5):
        loop.submit(Request(id=str(index), prompt=prompt, max_tokens=16, ignore_eos=True,
                            group="one"))  # fmt: skip
    found = served(loop)
    assert {result.token_ids for result in found.values()} == {expected}
    assert loop.num_prefilled == len(prompt)
    assert loop.num_displaced > 0


def test_a_remembered_beginning_is_reused_and_gives_way_to_who_needs_its_pages(
    engine: Engine,
) -> None:
    loop = loop_of(engine, scheduler="fifo", prefix_reuse=True)
    prompt = list(range(40, 60))
    for number in range(6):
        longer = [*prompt[: 20 - number], 7, 8 + number]
        loop.submit(Request(id="it", prompt=longer, max_tokens=8, ignore_eos=True))
        result = served(loop)["it"]
        assert result.token_ids == whole(engine, longer, 8)
    assert loop.num_reused > 60
    loop.submit(Request(id="it", prompt=[3] * 40, max_tokens=8, ignore_eos=True))
    assert served(loop)["it"].token_ids == whole(engine, [3] * 40, 8)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["submit", "submit", "cancel", "step"]), st.integers(0, 5)),
    min_size=4, max_size=20,
)  # fmt: skip


@settings(
    max_examples=8, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(EVENTS, st.booleans(), st.integers(0, 3))
def test_no_page_is_lost_whatever_comes_and_goes(
    engine: Engine, alone: list[tuple[int, ...]], events: list[tuple[str, int]], reuse: bool,
    seed: int,
) -> None:  # fmt: skip
    loop = loop_of(engine, prefix_reuse=reuse)
    random, found = np.random.default_rng(seed), dict[str, Result]()
    for event, index in events:
        if event == "cancel":
            loop.cancel(str(index))
        elif event == "submit" and str(index) not in found:
            count = int(random.integers(1, 19))
            stops = {"stop_token_ids": (alone[index][5],)} if count % 2 else {}
            loop.submit(asked(index, max_tokens=count, **stops))
        found |= {result.id: result for result in loop.step()}
        check(loop)
    found |= served(loop)
    for id, result in found.items():
        if result.finish in ("stop", "length"):
            assert result.token_ids == alone[int(id)][: len(result.token_ids)]
    pages = loop._cache.pages
    assert pages is not None
    assert reuse or pages.num_free == pages.num_pages


def test_fewer_tokens_than_one_sequence_may_have_are_refused() -> None:
    with pytest.raises(ValueError, match="cache_tokens=40 has no room for one sequence of"):
        ServeSettings(context=48, cache_tokens=40)
    with pytest.raises(ValueError, match=r"cache_tokens=64.0 is not a whole number"):
        ServeSettings(context=48, cache_tokens=64.0)  # type: ignore[arg-type]


def test_room_for_all_that_rows_can_have_needs_no_pages(engine: Engine) -> None:
    loop = loop_of(engine, cache_tokens=6 * CONTEXT)
    assert loop._cache.pages is None
    loop.submit(asked(0, max_tokens=3))
    assert len(drain(loop)["0"].token_ids) == 3
