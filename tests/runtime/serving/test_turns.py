"""Groups take turns: the choices of one request never keep another from its few tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.engine import Engine
from runtime.serving.request import Request, Result
from runtime.serving.scheduling.ordering import Fifo
from runtime.serving.scheduling.scheduler import Scheduler
from runtime.serving.scheduling.turns import group_of, in_turn, owed
from runtime.serving.sequence import ServedSequence
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.breaking import drain
from tests.helpers.serving import SMALL, greedy, offloaded, prompts, sequence
from tests.helpers.tiny import tiny_model
from tests.runtime.serving.test_scheduling import NOTHING, Spite, make_ready

POOL = prompts(8, 12)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny_model("olmoe", num_hidden_layers=2)
    with offloaded(model, tmp_path_factory.mktemp("turns")) as engine:
        yield engine


def choices(count: int, group: str, max_tokens: int = 25, **options: Any) -> list[Request]:
    """Choices of one long answer, each of its own random numbers."""
    return [
        Request(
            id=f"{group}-{i}", prompt=POOL[0], max_tokens=max_tokens, ignore_eos=True, group=group,
            temperature=1.0, seed=i, **options,
        )
        for i in range(count)
    ]  # fmt: skip


# ---------------------------------------------------------------------- the scheduler


def test_every_group_gets_a_row_before_any_gets_its_second() -> None:
    scheduler = Scheduler(Fifo(), ServeSettings(batch=4, rows=4))
    groups = ["a", "a", "a", "b", "b", "", "", "a"]
    waiting = [sequence(i, group=group) for i, group in enumerate(groups)]
    admitted = scheduler.admit(waiting, [], 6, NOTHING)
    assert [one.number for one in admitted] == [0, 3, 5, 6, 1, 4]


def test_rows_that_a_group_has_count_as_its_turns() -> None:
    active = [make_ready(sequence(i, group="a"), i) for i in range(2)]
    waiting = [sequence(2, group="a"), sequence(3, group="b"), sequence(4, group="b")]
    lists = [[one.number for one in same] for same in in_turn(waiting, active, 9)]
    assert lists == [[3], [4], [2]]


def test_a_group_by_itself_leaves_the_ordering_its_freedom() -> None:
    waiting = [sequence(i, group="a") for i in range(5)]
    assert [len(same) for same in in_turn(waiting, [], 9)] == [5]


@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.integers(0, 1)), max_size=8),
    st.permutations(range(8)),
    st.integers(0, 9),
)
def test_turns_go_by_priority_then_by_the_rows_of_a_group_then_by_arrival(
    kinds: list[tuple[str, int]], numbers: list[int], limit: int
) -> None:
    """Of one kind, which is the usual case and a quicker one, and of several."""
    waiting = [
        sequence(number, group=group, priority=priority)
        for number, (group, priority) in zip(numbers, kinds, strict=False)
    ]
    alone = len({group for group, _ in kinds}) == 1
    turns = [
        0 if alone else sum(kinds[before][0] == group != "" for before in range(at))
        for at, (group, _) in enumerate(kinds)
    ]
    ranks = {one: (-kinds[at][1], turns[at], one.number) for at, one in enumerate(waiting)}
    expected = sorted(waiting, key=lambda one: ranks[one])[:limit]
    found = list(in_turn(waiting, [], limit))
    assert [one for same in found for one in same] == expected
    assert all(len({ranks[one][:2] for one in same}) == 1 for same in found)


def test_a_large_group_gives_way_to_any_that_would_still_have_fewer_rows() -> None:
    active = [make_ready(sequence(i, group="a"), i) for i in range(4)]
    lone, other = sequence(4), sequence(5, group="b", priority=1)
    ((yielding, to),) = owed([lone], active)
    assert (yielding.number, to) == (3, lone)
    assert list(owed([sequence(6, group="a")], active)) == []
    assert list(owed([lone], active[:1])) == []
    assert list(owed([sequence(7, priority=-1)], active)) == []
    assert [one.to for one in owed([lone, other], active)] == [lone, other]


def test_a_step_takes_turns_among_groups_and_among_the_choices_of_each() -> None:
    scheduler = Scheduler(Fifo(), ServeSettings(batch=2, rows=8, max_skips=99))
    ready = [make_ready(sequence(i, group="a" if i < 6 else ""), i) for i in range(7)]
    ran = Counter[int]()
    for _ in range(12):
        chosen = [one.number for one in scheduler.compose(ready, NOTHING)]
        assert 6 in chosen and len(chosen) == 2
        ran.update(chosen)
    assert [ran[i] for i in range(7)] == [2] * 6 + [12]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    patience=st.integers(0, 6),
    arrivals=st.lists(st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=5), max_size=30),
    life=st.integers(1, 9),
    spiteful=st.booleans(),
)
def test_however_spiteful_the_ordering_the_first_of_every_group_gets_its_turn(
    rows: int, patience: int, arrivals: list[list[str]], life: int, spiteful: bool
) -> None:
    scheduler = Scheduler(
        Spite() if spiteful else Fifo(), ServeSettings(batch=rows, rows=rows, patience=patience)
    )
    waiting: list[ServedSequence] = []
    active: dict[ServedSequence, int] = {}
    number = 0
    total = sum(map(len, arrivals))
    for came in (*arrivals, *[[]] * (-(-total // rows) * life)):
        for group in came:
            waiting.append(sequence(number, group=group))
            number += 1
        for one in waiting[len(waiting) - len(came) :]:
            one.num_waiting_at_arrival = len(waiting)
        held = Counter(group_of(one) for one in active)
        for admitted in scheduler.admit(waiting, list(active), rows - len(active), NOTHING):
            waiting.remove(admitted)
            turn = held[group_of(admitted)]
            assert all(held[group_of(one)] >= turn for one in waiting)
            held[group_of(admitted)] += 1
            active[make_ready(admitted, 0)] = life
        active = {one: left - 1 for one, left in active.items() if left > 1}
    assert not waiting


# ---------------------------------------------------------------------- the loop


@pytest.mark.parametrize("scheduler", ["fifo", "predicted"])
def test_many_long_choices_keep_nobody_waiting(scheduler: str, engine: Engine) -> None:
    """The rows are full of one client's long answers when another comes with four tokens."""
    options: dict[str, Any] = {
        "batch": 4,
        "rows": 8,
        "context": 64,
        "scheduler": scheduler,
        "max_skips": 4,
    }
    loop = ServingLoop(engine, None, ServeSettings(**options))
    for request in choices(12, "many"):
        loop.submit(request)
    ended = [result for _ in range(8) for result in loop.step()]
    assert ended == [] and loop._cache.num_free == 0
    asked = Request(id="few", prompt=POOL[1], max_tokens=4)
    loop.submit(asked)
    steps = 0
    while not any(result.id == "few" for result in ended):
        ended = loop.step()
        steps += 1
    assert steps <= 4 + 1 + 4 * 4  # a chunk or two, and each token within its bound
    assert ended[-1].token_ids[:4] == greedy(engine.model, POOL[1], 4)
    assert len(drain(loop)) == 12
    assert loop._rows.num_parked == 0


def test_a_parked_sequence_goes_on_bit_by_bit(engine: Engine) -> None:
    options = SMALL | {"scheduler": "fifo"}
    alone = ServingLoop(engine, None, ServeSettings(**options))
    for request in choices(3, "many", logprobs=2):
        alone.submit(request)
    expected = drain(alone)
    loop = ServingLoop(engine, None, ServeSettings(**options))
    for request in choices(3, "many", logprobs=2):
        loop.submit(request)
    parked = 0
    served: dict[str, Result] = {}
    for step in range(400):
        if step % 5 == 4:
            loop.submit(Request(id=f"lone-{step}", prompt=POOL[step % 12], max_tokens=3))
        served |= {result.id: result for result in loop.step()}
        parked = max(parked, loop._rows.num_parked)
        if all(id in served for id in expected):
            break
    assert parked > 0
    drain(loop)
    for id, result in expected.items():
        assert served[id].token_ids == result.token_ids
        ours = [one.logprob for one in served[id].logprobs]
        assert ours == pytest.approx([one.logprob for one in result.logprobs], abs=1e-4)


@pytest.mark.parametrize("reuse", [False, True])
def test_parked_and_cancelled_sequences_leave_nothing_behind(engine: Engine, reuse: bool) -> None:
    loop = ServingLoop(engine, None, ServeSettings(**SMALL | {"prefix_reuse": reuse}))
    for request in choices(6, "many"):
        loop.submit(request)
    for _ in range(5):
        loop.step()
    for i in range(2):
        loop.submit(Request(id=f"lone-{i}", prompt=POOL[i], max_tokens=9, ignore_eos=True))
    loop.step()
    assert loop._rows.num_parked > 0
    for i in range(6):
        loop.cancel(f"many-{i}")
    served = drain(loop)
    assert Counter(result.finish for result in served.values()) == {"cancelled": 6, "length": 2}
    assert loop._rows.num_parked == 0 and loop._cache.num_free == loop._cache.num_rows


def test_a_stream_of_newcomers_does_not_starve_a_group(engine: Engine) -> None:
    loop = ServingLoop(engine, None, ServeSettings(**SMALL | {"scheduler": "fifo"}))
    for request in choices(6, "many", max_tokens=5):
        loop.submit(request)
    ended: set[str] = set()
    for step in range(300):
        for i in range(3):
            loop.submit(Request(id=f"new-{step}-{i}", prompt=[5, 6], max_tokens=2))
        ended |= {result.id for result in loop.step() if result.id.startswith("many")}
        if len(ended) == 6:
            break
    assert len(ended) == 6
    loop.cancel_all()


def test_the_prompts_of_a_group_run_in_turn_with_those_of_others(engine: Engine) -> None:
    loop = ServingLoop(
        engine, None, ServeSettings(batch=6, rows=6, context=64, chunk=4, scheduler="fifo")
    )
    for i in range(4):
        prompt = [10 + i] * 40
        loop.submit(Request(id=f"long-{i}", prompt=prompt, max_tokens=9, group="many"))
    loop.submit(Request(id="few", prompt=[5, 6, 7], max_tokens=1))
    ended = [result.id for _ in range(11) for result in loop.step()]
    assert ended == ["few"], "after the first of the group, before its second"
    assert len(drain(loop)) == 4


def test_a_group_has_to_be_text() -> None:
    with pytest.raises(ValueError, match="group=5"):
        Request(prompt=[1], group=5)  # type: ignore[arg-type]
