"""Served sequences some of whose pages lie in host memory: the tokens of each alone, no page lost.

On the CPU, whose engines have no storage of their own: here one is lent to the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.engine.engine import Engine
from runtime.kv.pages import places
from runtime.kv.pages.places import Places, Spilled
from runtime.kv.storage import Storage
from runtime.serving.model_runner import ModelRunner
from runtime.serving.request import Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from runtime.serving.steps.row_pages import RowPages
from tests.helpers.serving import SCHEDULERS, offloaded
from tests.helpers.tiny import tiny_model
from tests.runtime.serving.test_pages import CONTEXT, EVENTS, PAGE, POOL, asked, whole

ROWS = 6


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PAGE", PAGE)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with offloaded(tiny_model("olmoe"), tmp_path_factory.mktemp("spill")) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[tuple[int, ...]]:
    return [whole(engine, prompt) for prompt in POOL]


def loop_of(engine: Engine, pages: int = 13, host_pages: int = 40, **options: Any) -> ServingLoop:
    """A loop over so many pages on the device and in host memory."""
    storage = Storage(ROWS, CONTEXT, pages * PAGE, host_pages * PAGE)
    given: dict[str, Any] = {"batch": 4, "rows": ROWS, "context": CONTEXT, "chunk": 16} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "key_value_storage", storage)
        return ServingLoop(engine, None, ServeSettings(**given))


def check(loop: ServingLoop) -> None:
    """Every page has one owner; what is still to be written lies on the device."""
    table = loop._cache.pages
    assert table is not None
    rows = {one.row for one in loop.active} | set(loop._rows._held)
    assert {one.row: one for one in loop.active} == loop._rows.pages.in_flight
    owned = [page for row in range(loop._cache.num_rows) for page in table.of(row)]
    assert len(set(owned)) == len(owned)
    assert len(owned) == table.num_pages - table.num_free + table.num_spilled
    assert all(row in rows for row in range(loop._cache.num_rows) if table.of(row))
    for one in loop.active:
        assert len(table.spilled_of(one.row)) <= one.num_cached // PAGE
        assert len(table.of(one.row)) >= table.count(one.num_cached)


def served(loop: ServingLoop) -> tuple[dict[str, Result], int]:
    """The results, and the most pages that were in host memory at once."""
    found: dict[str, Result] = {}
    most = 0
    table = loop._cache.pages
    assert table is not None
    while not loop.is_idle:
        found |= {result.id: result for result in loop.step()}
        most = max(most, table.num_spilled)
        check(loop)
    return found, most


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_tokens_are_those_of_each_request_alone_and_nobody_is_parked_where_host_memory_has_room(
    scheduler: str, engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    loop = loop_of(engine, scheduler=scheduler)
    before = engine.stats().bytes_spilled
    for index in range(len(POOL)):
        loop.submit(asked(index))
    found, most = served(loop)
    assert [found[str(index)].token_ids for index in range(len(POOL))] == alone
    assert most > 0 and loop.num_displaced == 0
    table = loop._cache.pages
    assert table is not None
    assert (table.num_free, table.num_spilled) == (table.num_pages, 0)
    assert engine.stats().bytes_spilled > before
    assert "of keys and values read in host memory" in engine.report()


def attend_singles(
    query: Tensor, keys: Tensor, values: Tensor, rows_B: Tensor, positions_B: Tensor,
    paged: Places, _real: Any, spilled: Spilled | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Single tokens beside prompts, as a GPU has them: [1, B, heads, width]."""
    outputs = []
    far_keys, far_values = spilled or (None, None)
    at = zip(query[0].unbind(1), rows_B.tolist(), positions_B.tolist(), strict=True)
    for query_HD, row, position in at:
        key_GCD = paged.row(keys, row, position + 1, far_keys)[0]
        value_GCD = paged.row(values, row, position + 1, far_values)[0]
        query_GMD = query_HD.view(len(key_GCD), -1, query_HD.shape[-1]) * kwargs["scaling"]
        share_GMC = (query_GMD @ key_GCD.mT).softmax(-1)
        outputs.append((share_GMC @ value_GCD).flatten(0, 1))
    return torch.stack(outputs)[None]


def test_prompts_of_other_lengths_attend_together_in_rows_that_had_pages_in_host_memory(
    engine: Engine,
) -> None:
    loop = loop_of(engine, batch=ROWS, chunk=64, scheduler="fifo")
    loop._runner.attend_singles = attend_singles
    lengths = np.random.default_rng(1).integers(2, 24, 40).tolist()
    for index, length in enumerate(lengths):
        loop.submit(Request(id=str(index), prompt=[5 + index] * length, max_tokens=5 + length % 20,
                            ignore_eos=True))  # fmt: skip
    found, most = served(loop)
    assert most > 0 and loop.num_failed_steps == 0
    assert {result.finish for result in found.values()} == {"length"}


def test_where_nothing_can_be_spilled_any_more_the_newest_is_parked(
    engine: Engine, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Admission counts on nobody's next page here."""
    loop = loop_of(engine, host_pages=4, scheduler="fifo", batch=ROWS)
    table = loop._cache.pages
    assert table is not None
    count = table.count
    monkeypatch.setattr(RowPages, "ahead", lambda _, one: count(len(one.token_ids)))
    for index in range(len(POOL)):
        loop.submit(asked(index))
    found, most = served(loop)
    assert [found[str(index)].token_ids for index in range(len(POOL))] == alone
    assert most == 4 and loop.num_displaced > 0


def test_more_begin_where_host_memory_has_room(engine: Engine) -> None:
    """As many as all pages hold once the first ones decode; prompts lie on the device."""
    most = []
    for host_pages in (0, 40):
        loop = loop_of(engine, host_pages=host_pages, batch=ROWS, scheduler="fifo")
        for index in range(ROWS):
            loop.submit(Request(id=str(index), prompt=[7 + index] * 10, max_tokens=30,
                                ignore_eos=True))  # fmt: skip
        running = 0
        while not loop.is_idle:
            loop.step()
            running = max(running, len(loop.active))
        most.append(running)
    assert most[1] > most[0] + 1


def test_pages_come_back_where_they_are_free_and_stay_there(engine: Engine) -> None:
    loop = loop_of(engine, batch=2, scheduler="fifo")
    loop.submit(Request(id="a", prompt=[5] * 20, max_tokens=26, ignore_eos=True))
    loop.submit(Request(id="b", prompt=[6] * 20, max_tokens=12, ignore_eos=True))
    table = loop._cache.pages
    assert table is not None
    away = []
    while not loop.is_idle:
        loop.step()
        away.append(table.num_spilled)
    assert max(away) > 0 and away[-2] == 0
    assert table.num_moved <= 2 * max(away), "once there, and once back"


def test_a_beginning_is_reused_of_rows_whose_pages_were_sent_away(engine: Engine) -> None:
    """Some tokens fewer, where the page that is gone on with lies in host memory."""
    loop = loop_of(engine, scheduler="fifo", prefix_reuse=True, batch=2)
    prompt = list(range(40, 58))
    for number in range(4):
        loop.submit(Request(id="one", prompt=prompt, max_tokens=24, ignore_eos=True))
        loop.submit(Request(id="other", prompt=[9 + number] * 16, max_tokens=24, ignore_eos=True))
        found, most = served(loop)
        assert most > 0
        assert found["one"].token_ids == whole(engine, prompt, 24)
        prompt = [*prompt[: 16 - number], 7, 8 + number]
    assert loop.num_reused > 30


def test_choices_of_one_prompt_spill_what_each_has_of_its_own(engine: Engine) -> None:
    loop = loop_of(engine, scheduler="fifo", batch=4)
    prompt = list(range(20, 33))
    for index in range(4):
        loop.submit(Request(id=str(index), prompt=prompt, max_tokens=16, ignore_eos=True,
                            group="one"))  # fmt: skip
    found, most = served(loop)
    assert {result.token_ids for result in found.values()} == {whole(engine, prompt, 16)}
    assert loop.num_prefilled == len(prompt) and most > 0


@pytest.mark.parametrize("repeats", [True, False])
def test_after_a_step_that_failed_everyone_goes_on(
    repeats: bool, engine: Engine, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tokens must not run twice, all of a sequence run again over pages of the device."""
    loop = loop_of(engine, scheduler="fifo")
    if not repeats:
        monkeypatch.setattr(type(loop._rows), "can_repeat", False)
    table, run = loop._cache.pages, ModelRunner.run
    failed: list[int] = []

    def run_or_fail(runner: ModelRunner, parts: Any, renew: Any) -> Any:
        assert table is not None
        if table.num_spilled and len(parts) > 1 and len(failed) < 3:
            failed.append(table.num_spilled)
            raise RuntimeError("a step that fails")
        return run(runner, parts, renew)

    monkeypatch.setattr(ModelRunner, "run", run_or_fail)
    for index in range(len(POOL)):
        loop.submit(asked(index))
    found, _ = served(loop)
    assert len(failed) == 3
    assert [found[str(index)].token_ids for index in range(len(POOL))] == alone


def test_rows_that_others_wrote_to_run_again_over_pages_of_the_device(
    engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    loop = loop_of(engine, scheduler="fifo")
    storage, table = loop._cache.storage, loop._cache.pages
    assert storage is not None and table is not None
    for index in range(len(POOL)):
        loop.submit(asked(index))
    found: dict[str, Result] = {}
    lost = 0
    while not loop.is_idle:
        found |= {result.id: result for result in loop.step()}
        check(loop)
        if table.num_spilled and lost < 2:
            lost += 1
            storage.claim(object())
            for tensor in loop._cache.by_position:
                tensor.fill_(float("nan"))
    assert lost == 2
    assert [found[str(index)].token_ids for index in range(len(POOL))] == alone


@settings(
    max_examples=10, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(EVENTS, st.booleans(), st.integers(0, 3), st.integers(0, 9))
def test_no_page_is_lost_whatever_comes_and_goes(
    engine: Engine, alone: list[tuple[int, ...]], events: list[tuple[str, int]], reuse: bool,
    seed: int, host_pages: int,
) -> None:  # fmt: skip
    loop = loop_of(engine, host_pages=host_pages, prefix_reuse=reuse)
    random, found = np.random.default_rng(seed), dict[str, Result]()
    for event, index in events:
        if event == "cancel":
            loop.cancel(str(index))
        elif event == "submit" and str(index) not in found:
            loop.submit(asked(index, max_tokens=int(random.integers(1, 19))))
        found |= {result.id: result for result in loop.step()}
        check(loop)
    found |= served(loop)[0]
    for id, result in found.items():
        if result.finish in ("stop", "length"):
            assert result.token_ids == alone[int(id)][: len(result.token_ids)]
    table = loop._cache.pages
    assert table is not None
    assert reuse or (table.num_free, table.num_spilled) == (table.num_pages, 0)
