"""The server for asyncio: places in its queue, its end, and nobody who waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import numpy as np
import pytest

from runtime.engine.engine import Engine
from runtime.serving.async_server import AsyncServer, QueueFull
from runtime.serving.request import Delta, Request, Result
from tests.helpers.breaking import POISON, Panic, poison
from tests.helpers.serving import SMALL, greedy, offloaded
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny_model("olmoe", num_hidden_layers=2)
    with offloaded(model, tmp_path_factory.mktemp("async")) as engine:
        yield engine


def endless(id: str = "endless", **options: Any) -> Request:
    return Request(id=id, prompt=[2, 3], max_tokens=60, ignore_eos=True, **options)


def short(id: str = "short") -> Request:
    return Request(id=id, prompt=[3, 4], max_tokens=3)


def within(main: Coroutine[Any, Any, Any], seconds: float = 30) -> Any:
    """The result of `main`, which must not take longer."""
    return asyncio.run(asyncio.wait_for(main, seconds))


# ---------------------------------------------------------------------- steps that fail


def test_a_step_that_fails_ends_its_request_and_the_next_is_served(engine: Engine) -> None:
    alone = greedy(engine.model, [3, 4], 3)

    async def main() -> tuple[Result, Result, str]:
        async with AsyncServer(engine, **SMALL) as server:
            poison(server.loop)
            bad = await server.complete(Request(prompt=[2], max_tokens=2, label=POISON))
            return bad, await server.complete(short()), server.failure

    bad, good, failure = within(main())
    assert (bad.finish, bad.error) == ("error", "RuntimeError: out of memory")
    assert bad.fault == "server"
    assert good.token_ids == alone and failure == ""


def test_where_the_engine_cannot_go_on_every_request_hears_of_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "check_integrity", lambda: 1 / 0)

    async def main() -> list[Result]:
        async with AsyncServer(engine, **SMALL) as server:
            poison(server.loop)
            streams = server.open([endless(str(i), label=POISON) for i in range(9)])
            results = await asyncio.gather(*(stream.result() for stream in streams))
            assert "ZeroDivisionError" in server.failure
            with pytest.raises(RuntimeError, match="ZeroDivisionError"):
                await server.complete(short())
            return results

    assert {(result.finish, result.fault) for result in within(main())} == {("error", "server")}


@pytest.mark.parametrize("error", [RuntimeError("bug"), Panic("unwrap"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("loop_works", [True, False])
def test_nobody_waits_for_a_thread_that_died(
    engine: Engine, error: BaseException, loop_works: bool
) -> None:
    def die(*_: Any) -> Any:
        raise error

    async def main() -> list[Result]:
        async with AsyncServer(engine, **SMALL) as server:
            server.loop.step = die  # type: ignore[method-assign]
            if not loop_works:
                server.loop.fail_all = die  # type: ignore[method-assign,assignment]
            streams = server.open([endless("0"), endless("1")])
            results = await asyncio.gather(*(stream.result() for stream in streams))
            with pytest.raises(RuntimeError, match="no request can be served any more"):
                server.stream(short())
            assert server.num_open == 0
            return results

    assert {(result.finish, result.fault) for result in within(main())} == {("error", "server")}


def test_a_callback_that_exits_ends_its_own_request_only(engine: Engine) -> None:
    def leave(_: Delta) -> None:
        raise SystemExit

    async def main() -> tuple[Result, Result]:
        async with AsyncServer(engine, **SMALL) as server:
            bad = Request(prompt=[2], max_tokens=5, on_token=leave)
            return await asyncio.gather(server.complete(bad), server.complete(short()))

    bad, good = within(main())
    assert (bad.finish, bad.fault) == ("error", "request") and "on_token" in bad.error
    assert good.finish != "error"


# ---------------------------------------------------------------------- start and end


def test_before_its_start_and_after_its_end_a_server_says_so(engine: Engine) -> None:
    async def main() -> None:
        server = AsyncServer(engine, **SMALL)
        with pytest.raises(RuntimeError, match="has not started"):
            await server.complete(short())
        async with server:
            assert (await server.complete(short())).finish != "error"
            with pytest.raises(RuntimeError, match="started before"):
                await server.__aenter__()
        with pytest.raises(RuntimeError, match="shutting down"):
            await server.complete(short())
        await server.aclose()

    within(main())


def test_an_end_cancels_those_in_flight_and_those_that_wait_with_a_reason(engine: Engine) -> None:
    async def main() -> list[Result]:
        async with AsyncServer(engine, **SMALL | {"batch": 1, "rows": 1}) as server:
            tasks = [asyncio.create_task(server.complete(endless(str(i)))) for i in range(9)]
            while server.loop.num_steps < 2:
                await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks)

    for result in within(main()):
        assert (result.finish, result.error) == ("cancelled", "the server is shutting down")


def test_within_its_grace_a_server_lets_requests_end_and_takes_no_more(engine: Engine) -> None:
    async def main() -> Result:
        async with AsyncServer(engine, **SMALL) as server:
            stream = server.stream(endless())
            closing = asyncio.create_task(server.aclose(grace=30))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="shutting down"):
                server.stream(short())
            await closing
            return await stream.result()

    assert within(main()).finish == "length"


def test_a_server_that_ends_while_requests_are_submitted_gives_each_its_end(engine: Engine) -> None:
    for _ in range(20):

        async def main() -> None:
            server = await AsyncServer(engine, **SMALL).__aenter__()
            streams = []

            def submit() -> None:
                async def flood() -> None:
                    for i in range(200):
                        try:
                            streams.append(server.stream(endless(str(i))))
                        except RuntimeError:
                            break
                    await asyncio.gather(*(stream.result() for stream in streams))

                asyncio.run(asyncio.wait_for(flood(), 20))

            thread = threading.Thread(target=submit)
            thread.start()
            await server.aclose()
            await asyncio.to_thread(thread.join)
            assert server.num_open == 0

        within(main())


def test_streams_belong_to_the_event_loop_that_opened_them(engine: Engine) -> None:
    alone, results = greedy(engine.model, [3, 4], 3), []

    async def main() -> None:
        async with AsyncServer(engine, **SMALL) as server:

            def other() -> None:
                results.extend(asyncio.run(both(server, "other")))

            thread = threading.Thread(target=other)
            thread.start()
            results.extend(await both(server, "this"))
            await asyncio.to_thread(thread.join)

    async def both(server: AsyncServer, name: str) -> list[Result]:
        return await asyncio.gather(*(server.complete(short(f"{name}-{i}")) for i in range(2)))

    within(main())
    assert [result.token_ids for result in results] == [alone] * 4


def test_an_event_loop_that_closed_leaves_the_server_to_others(engine: Engine) -> None:
    async def main() -> Result:
        async with AsyncServer(engine, **SMALL) as server:

            async def leave() -> None:
                kept.append(server.stream(endless()))

            kept: list[Any] = []
            await asyncio.to_thread(lambda: asyncio.run(leave()))
            result = await server.complete(short())
            while server.num_open:
                await asyncio.sleep(0.001)
            return result

    assert within(main()).finish != "error"


def test_a_step_wakes_an_event_loop_once_for_all_of_its_streams(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [endless(str(number)) for number in range(4)]

    async def main() -> tuple[list[list[Any]], int, int]:
        loop = asyncio.get_running_loop()
        wake, woken = loop.call_soon_threadsafe, []

        def counted(*args: Any) -> Any:
            if threading.current_thread().name == "expertflow-steps":
                woken.append(args)
            return wake(*args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        async with AsyncServer(engine, **SMALL) as server:
            streams = server.open(asked)
            items = [[item async for item in stream] for stream in streams]
            return items, len(woken), server.loop.num_steps

    items, num_woken, num_steps = within(main())
    for request, (*deltas, result) in zip(asked, items, strict=True):
        assert [delta.token_id for delta in deltas] == list(result.token_ids)
        assert {delta.id for delta in deltas} == {request.id}
    assert sum(len(one) for one in items) > 2 * num_steps
    assert num_woken <= num_steps


def test_a_stream_that_is_dropped_cancels_its_request(engine: Engine) -> None:
    async def main() -> Any:
        async with AsyncServer(engine, **SMALL) as server:
            async for _ in server.stream(endless()):
                break
            while server.num_open:
                await asyncio.sleep(0.001)
            return server.loop.finished

    assert within(main()) == {"cancelled": 1}


def test_a_late_close_never_ends_another_request_of_the_same_id(engine: Engine) -> None:
    async def main() -> Result:
        async with AsyncServer(engine, **SMALL) as server:
            first = server.stream(short("same"))
            while server.num_open:
                await asyncio.sleep(0.001)
            second = server.stream(endless("same"))
            first.close()
            return await second.result()

    assert within(main()).finish == "length"


# ---------------------------------------------------------------------- the queue


def test_a_burst_never_opens_more_requests_than_the_queue_takes(engine: Engine) -> None:
    async def main() -> tuple[int, int]:
        async with AsyncServer(engine, max_queue=4, **SMALL) as server:
            tasks = [asyncio.create_task(server.complete(endless(str(i)))) for i in range(20)]
            await asyncio.sleep(0)
            assert server.num_open == 4
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            full = [error for error in ended if isinstance(error, QueueFull)]
            assert all(error.retry_after >= 1 for error in full)
            return len(full), sum(isinstance(one, Result) for one in ended)

    assert within(main()) == (16, 4)


def test_of_several_choices_all_are_taken_or_none(engine: Engine) -> None:
    async def main() -> None:
        async with AsyncServer(engine, max_queue=4, **SMALL) as server:
            streams = server.open([endless(str(i)) for i in range(3)])
            with pytest.raises(QueueFull, match="4 requests are open"):
                server.open([short("a"), short("b")])
            assert server.num_open == 3
            server.stream(short())
            with pytest.raises(ValueError, match="in flight already"):
                server.open([endless("0")])
            for stream in streams:
                stream.close()

    within(main())


def test_serving_many_holds_as_few_as_the_queue_takes_and_delivers_before_it_raises(
    engine: Engine,
) -> None:
    def source() -> Iterator[Request]:
        for i in range(30):
            yield short(str(i))
        raise OSError("the data set is gone")

    async def main() -> int:
        count = 0

        async def count_all(server: AsyncServer) -> None:
            nonlocal count
            async for _ in server.serve(source()):
                count += 1
                assert server.num_open <= 3

        async with AsyncServer(engine, max_queue=3, **SMALL) as server:
            with pytest.raises(OSError, match="the data set is gone"):
                await count_all(server)
        return count

    assert within(main()) == 30


@pytest.mark.parametrize("most", [0, -1])
def test_a_queue_without_places_is_refused(engine: Engine, most: int) -> None:
    with pytest.raises(ValueError, match="max_queue"):
        AsyncServer(engine, max_queue=most)


# ---------------------------------------------------------------------- a soak


def test_a_soak_of_requests_that_are_cancelled_at_random_ends_clean(
    engine: Engine,
) -> None:
    random = np.random.default_rng(3)

    async def one(server: AsyncServer, i: int) -> Result | None:
        options: dict[str, Any] = {"group": str(i % 5) if i % 2 else ""}
        if i % 11 == 0:
            options["label"] = POISON
        request = Request(id=str(i), prompt=[2 + i % 9] * (1 + i % 13), max_tokens=8, **options)
        task = asyncio.create_task(server.complete(request))
        if random.random() < 0.4:
            await asyncio.sleep(random.random() * 0.05)
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return None

    async def main() -> None:
        settings = SMALL | {"batch": 8, "rows": 12, "prefix_reuse": True}
        async with AsyncServer(engine, **settings) as server:
            poison(server.loop)
            results = await asyncio.gather(*(one(server, i) for i in range(200)))
            while server.num_open:
                await asyncio.sleep(0.001)
            for i, result in enumerate(results):
                if result is not None and i % 11:
                    assert result.finish in ("stop", "length"), result
            assert server.loop._cache.num_free == 12 and server.loop.is_idle
            assert server.loop._rows.num_parked == 0
        engine.check_integrity()

    within(main(), 60)
