"""Many clients at once, priorities, and an end in good order."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from runtime.engine.engine import Engine
from runtime.server.errors import Refused
from runtime.server.protocol.completion import CompletionBody
from runtime.server.runs import Places, Run
from runtime.server.settings import ServerSettings
from runtime.serving.request import Request, Result
from tests.helpers.http_server import connect, running
from tests.helpers.tiny import save_tiny, tiny_tokenizer

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 190, "ignore_eos": True}

SHORT = LONG | {"max_tokens": 40}


def metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def test_places_are_counted_choice_by_choice() -> None:
    places = Places(8)
    give_back = places.take(5)
    with pytest.raises(Refused) as full:
        places.take(4)
    assert full.value.status == 429
    give_back()
    give_back()
    places.take(8)
    with pytest.raises(Refused) as never:
        places.take(9)
    assert never.value.status == 400


def test_forty_at_once_do_not_pass_a_limit_of_eight(engine: Engine) -> None:
    with running(engine, max_queue=8) as address, ThreadPoolExecutor(40) as pool:
        barrier = threading.Barrier(40)

        def ask(number: int) -> httpx.Response:
            barrier.wait()
            kind = {"stream": True} if number % 2 else {}
            return httpx.post(f"{address}/v1/completions", json=SHORT | kind, timeout=60)

        answers = list(pool.map(ask, range(40)))
        counted = Counter(answer.status_code for answer in answers)
        assert counted.keys() == {200, 429} and counted[200] <= 8 + 8
        turned_away = next(answer for answer in answers if answer.status_code == 429)
        assert turned_away.headers["retry-after"] == "1"
        assert turned_away.json()["error"]["code"] == "rate_limit_exceeded"
        assert httpx.post(f"{address}/v1/completions", json=SHORT).status_code == 200


def test_a_full_queue_is_a_rate_limit_to_the_client_who_may_try_again(engine: Engine) -> None:
    with running(engine, max_queue=1) as address, connect(address) as client:
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=190, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.BadRequestError, match="more than the 1 that this server holds"):
            client.completions.create(model="tiny", prompt="a", n=2)
        patient = client.with_options(max_retries=5)
        stream.close()
        assert patient.completions.create(model="tiny", prompt="a", max_tokens=1).choices


def test_a_streaming_client_that_leaves_while_it_waits_is_not_served(engine: Engine) -> None:
    with running(engine, batch=1, rows=1) as address:
        ahead = threading.Thread(
            target=httpx.post,
            args=(f"{address}/v1/completions",),
            kwargs={"json": LONG | {"n": 2}, "timeout": 60},
        )
        ahead.start()
        while not metric(address, "expertflow_requests_active"):
            time.sleep(0.005)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=LONG | {"stream": True}, timeout=0.05)
        ahead.join()
        while metric(address, "expertflow_requests_active"):
            time.sleep(0.01)
        assert metric(address, 'expertflow_requests_total{finish="cancelled"}') == 1


def test_a_client_has_no_more_priority_than_the_server_gives(engine: Engine) -> None:
    asked = {"prompt": "a", "max_tokens": 1}
    with running(engine, max_priority=3) as address:
        for priority, status in ((4, 400), (3, 200), (0, 200), (-9, 200)):
            body = asked | {"priority": priority}
            assert httpx.post(f"{address}/v1/completions", json=body).status_code == status


def test_what_outlasts_the_grace_ends_with_a_message_whole_or_streamed(engine: Engine) -> None:
    told: dict[str, Any] = {}
    with running(engine, grace=0, batch=1, rows=1) as address:

        def ask(kind: str, **more: Any) -> None:
            body = LONG | {"n": 60} | more
            told[kind] = httpx.post(f"{address}/v1/completions", json=body, timeout=60)

        asking = [
            threading.Thread(target=ask, args=("streamed",), kwargs={"stream": True}),
            threading.Thread(target=ask, args=("whole",)),
        ]
        for thread, least in zip(asking, (50, 100), strict=True):  # the stream begins first
            thread.start()
            while metric(address, "expertflow_requests_waiting") < least:
                time.sleep(0.01)
    for thread in asking:
        thread.join()
    assert told["whole"].status_code == 503
    assert told["whole"].json()["error"]["message"] == "the server is shutting down"
    last = told["streamed"].text.strip().splitlines()[-1]
    assert told["streamed"].status_code == 200
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "service_unavailable"


def test_a_signal_lets_requests_finish_and_ends_the_command(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", "olmoe")
    log = (tmp_path / "log").open("w")
    command = [sys.executable, "-m", "runtime.server", "--model", str(model), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--context", "200", "--grace", "20"], stderr=log, env=dict(os.environ)
    )
    try:
        address = ""
        while not address:
            assert server.poll() is None, (tmp_path / "log").read_text()
            found = (tmp_path / "log").read_text().partition("running on ")[2].split(" ")[0]
            address = found.strip()
            time.sleep(0.05)
        with (
            httpx.Client(timeout=60) as http,
            http.stream("POST", f"{address}/v1/completions", json=LONG | {"stream": True}) as said,
        ):
            lines = said.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(30) in (0, -signal.SIGTERM)
    finally:
        server.kill()


def test_a_fault_of_a_step_is_the_servers_and_one_of_the_request_the_clients() -> None:
    asked = Request(prompt=[1])

    class Failing:
        """A server whose requests all end with one error."""

        failure = ""

        def __init__(self, fault: str) -> None:
            self._fault = fault

        async def stream(self, request: Request) -> AsyncIterator[Result]:
            ended = Result(
                id=request.id, text="", token_ids=(), num_prompt=1, finish="error",
                error="seed is odd",
            )  # fmt: skip
            object.__setattr__(ended, "fault", self._fault)
            yield ended

    async def status(fault: str) -> tuple[int, str | None]:
        server: Any = Failing(fault)
        run = Run(server, [asked], lambda _: None, {"seed": None}, "prompt")
        with pytest.raises(Refused) as refused:
            await run.next()
        await run.close()
        return refused.value.status, refused.value.param

    assert asyncio.run(status("server")) == (500, None)
    assert asyncio.run(status("request")) == (400, "seed")


@pytest.mark.skipif("group" not in Request.__dataclass_fields__, reason="requests have no groups")
def test_the_choices_of_one_answer_share_a_turn() -> None:
    body = CompletionBody.of({"prompt": ["a", "b"], "n": 2})
    requests: list[Any] = body.requests([[1], [2]], 100)
    assert len({request.group for request in requests}) == 1 and requests[0].group
    assert len({request.id for request in requests}) == 4


# ---------------------------------------------------------------------- chat templates


def test_a_template_that_is_given_replaces_the_models_own(engine: Engine) -> None:
    given = "{{ messages[0].content }}!"
    hi: list[Any] = [{"role": "user", "content": "hi"}]
    with running(engine, chat_template=given) as address, connect(address) as client:
        said = client.chat.completions.create(model="tiny", messages=hi, max_tokens=1)
    assert said.usage is not None
    assert said.usage.prompt_tokens == len(tiny_tokenizer()("hi!").input_ids)


def test_a_chat_without_a_template_is_refused_with_the_remedy(engine: Engine) -> None:
    hi: list[Any] = [{"role": "user", "content": "hi"}]
    with running(engine, template=None) as address, connect(address) as client:
        with pytest.raises(openai.BadRequestError, match="--chat_template"):
            client.chat.completions.create(model="tiny", messages=hi)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


def test_what_a_template_raises_is_the_requests_own_error(engine: Engine) -> None:
    picky = "{{ raise_exception('Only users may speak') }}"
    hi: list[Any] = [{"role": "system", "content": "hi"}]
    with (
        running(engine, chat_template=picky) as address,
        connect(address) as client,
        pytest.raises(openai.BadRequestError, match="Only users may speak") as refused,
    ):
        client.chat.completions.create(model="tiny", messages=hi)
    assert refused.value.param == "messages"


def test_a_template_that_is_missing_or_broken_stops_the_start(
    engine: Engine, tmp_path: Path
) -> None:
    for given, told in (("missing.jinja", "neither a file"), ("{% if %}", "chat_template: line")):
        with (
            pytest.raises(ValueError, match=told),
            running(engine, chat_template=given),
        ):
            pass


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"grace": -1}, "grace=-1"),
        ({"body_timeout": 0}, "body_timeout=0"),
        ({"max_choices": 0}, "max_choices=0"),
        ({"tool_format": "xml"}, "tool_format='xml' is not one of hermes"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ServerSettings(model="m", **options)


def test_what_was_served_is_told_at_the_end(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with running(engine) as address:
        log = logging.getLogger("uvicorn.error")
        log.setLevel(logging.INFO)
        log.addHandler(caplog.handler)
        with connect(address) as client:
            client.completions.create(model="tiny", prompt="abc", max_tokens=3)
    log.removeHandler(caplog.handler)
    assert f"served: {engine.report()}" in caplog.text
