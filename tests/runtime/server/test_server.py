"""The HTTP server, spoken to by the official `openai` client over a real socket."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch

from runtime.engine.engine import Engine
from runtime.server.settings import ServerSettings
from tests.helpers.http_server import connect, running
from tests.helpers.serving import greedy
from tests.helpers.tiny import tiny_tokenizer

TOKEN = "open sesame"


def alone(engine: Engine, text: str, max_tokens: int) -> str:
    tokenizer = tiny_tokenizer()
    tokens = greedy(engine.model, tokenizer(text).input_ids, max_tokens)
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


# ---------------------------------------------------------------------- answers


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_completion_is_what_the_model_generates(client: openai.OpenAI, engine: Engine) -> None:
    said = client.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0)
    assert said.choices[0].text == alone(engine, "abc", 9)
    assert said.choices[0].finish_reason == "length"
    assert said.usage is not None and said.usage.prompt_tokens == len(
        tiny_tokenizer()("abc").input_ids
    )
    assert said.usage.total_tokens == said.usage.prompt_tokens + 9


def test_several_prompts_get_an_answer_each(client: openai.OpenAI, engine: Engine) -> None:
    prompts = ["abc", "hello", "q"]
    said = client.completions.create(model="tiny", prompt=prompts, max_tokens=5, temperature=0)
    assert [choice.index for choice in said.choices] == [0, 1, 2]
    assert [choice.text for choice in said.choices] == [alone(engine, p, 5) for p in prompts]


def test_a_prompt_may_be_token_ids(client: openai.OpenAI, engine: Engine) -> None:
    ids = tiny_tokenizer()("abc").input_ids
    said = client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0)
    assert said.choices[0].text == alone(engine, "abc", 5)


def test_a_streamed_completion_is_the_same_text(client: openai.OpenAI, engine: Engine) -> None:
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="abc",
            max_tokens=9,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == alone(engine, "abc", 9)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 9


def test_a_chat_goes_through_the_template(client: openai.OpenAI, engine: Engine) -> None:
    said = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=8,
        temperature=0,
    )
    assert said.choices[0].message.content == alone(engine, "user: hi\nassistant:", 8)
    assert said.choices[0].message.role == "assistant"


def test_a_chat_can_be_streamed(client: openai.OpenAI, engine: Engine) -> None:
    chunks = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    text = "".join(delta.content or "" for delta in deltas)
    assert text == alone(engine, "user: hi\nassistant:", 8)


def test_a_seed_repeats_and_a_stop_string_stops(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "seed": 7}
    whole = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked).choices[0].text == whole
    stop = whole[8:11]
    cut = client.completions.create(**asked, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


# ---------------------------------------------------------------------- several choices


def test_n_choices_a_prompt_are_those_of_n_seeds(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8}
    single = [
        client.completions.create(prompt=prompt, seed=seed, **asked).choices[0].text
        for prompt in ("abc", "q")
        for seed in (5, 6, 7)
    ]
    said = client.completions.create(prompt=["abc", "q"], seed=5, n=3, **asked)
    assert [choice.index for choice in said.choices] == list(range(6))
    assert [choice.text for choice in said.choices] == single
    assert len(set(single[:3])) > 1
    prompts = sum(len(tiny_tokenizer()(prompt).input_ids) for prompt in ("abc", "q"))
    assert said.usage is not None and said.usage.prompt_tokens == prompts


def test_streamed_choices_of_a_chat_each_say_who_speaks(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    asked |= {"n": 2, "seed": 3, "max_tokens": 6}
    whole = client.chat.completions.create(**asked)
    chunks = [*client.chat.completions.create(**asked, stream=True)]
    for index in (0, 1):
        deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == index]
        assert deltas[0].role == "assistant"
        text = "".join(delta.content or "" for delta in deltas)
        assert text == whole.choices[index].message.content


# ---------------------------------------------------------------------- log-probabilities


def expected_logprobs(engine: Engine, text: str, max_tokens: int) -> torch.Tensor:
    """Float [tokens, V]: of a greedy continuation, in one pass over all of it."""
    ids = tiny_tokenizer()(text).input_ids
    whole = [*ids, *greedy(engine.model, ids, max_tokens)]
    with torch.no_grad():
        logits: torch.Tensor = engine.model(input_ids=torch.tensor([whole])).logits[0]
    return logits[len(ids) - 1 : -1].log_softmax(-1)


def test_a_completions_logprobs_are_the_models(client: openai.OpenAI, engine: Engine) -> None:
    expected_TV = expected_logprobs(engine, "abc", 6)
    said = client.completions.create(
        model="tiny", prompt="abc", max_tokens=6, temperature=0, logprobs=3
    )
    found = said.choices[0].logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs
    np.testing.assert_allclose(found.token_logprobs, expected_TV.max(-1).values, atol=1e-4)
    for top, values_V in zip(found.top_logprobs, expected_TV, strict=True):
        np.testing.assert_allclose([*top.values()], values_V.topk(3).values[: len(top)], atol=1e-4)
    assert "".join(found.tokens) == said.choices[0].text
    text = said.choices[0].text
    assert found.text_offset is not None
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert text[offset:].startswith(token)


def test_logprobs_are_the_models_own_whatever_the_sampling_rules(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 1, "logprobs": 0}
    calm, wild = (
        client.completions.create(**asked, seed=1, temperature=t, extra_body={"top_k": 1})
        for t in (0, 2.0)
    )
    assert calm.choices[0].logprobs == wild.choices[0].logprobs


def test_a_chats_logprobs_come_whole_or_streamed(client: openai.OpenAI, engine: Engine) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    asked |= {"max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    expected_TV = expected_logprobs(engine, "user: hi\nassistant:", 5)
    said = client.chat.completions.create(**asked).choices[0].logprobs
    assert said is not None and said.content is not None
    np.testing.assert_allclose(
        [[top.logprob for top in token.top_logprobs] for token in said.content],
        expected_TV.topk(2).values,
        atol=1e-4,
    )
    assert all(
        bytes(token.bytes or []).decode(errors="replace") == token.token for token in said.content
    )
    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert [one.token for one in streamed] == [one.token for one in said.content]


def test_top_logprobs_without_logprobs_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], top_logprobs=2
        )


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "there is no model gpt"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 500}, openai.BadRequestError, "exceed the context of 200"),
        ({"logprobs": 21}, openai.BadRequestError, "logprobs"),
        ({"n": 0}, openai.BadRequestError, "n: "),
        ({"n": 70, "prompt": ["a", "b"]}, openai.BadRequestError, "at most 128"),
        ({"suffix": "s"}, openai.BadRequestError, "suffix"),
        ({"prompt": []}, openai.BadRequestError, "empty"),
        ({"prompt": ["a"] * 129}, openai.BadRequestError, "at most 128"),
        ({"stop": ""}, openai.BadRequestError, "empty stop"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(
    client: openai.OpenAI, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        client.completions.create(**({"model": "tiny", "prompt": "a"} | options))


def test_a_refused_stream_has_a_status_too(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="exceed the context"):
        client.completions.create(model="tiny", prompt="a", max_tokens=500, stream=True)


def test_the_token_is_asked_for_everywhere_but_health(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with running(engine, token_file=file) as address:
        assert connect(address, TOKEN).models.list().data
        with pytest.raises(openai.AuthenticationError):
            connect(address, "guess").models.list()
        assert httpx.get(f"{address}/metrics").status_code == 401
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_body_beyond_the_limit_is_turned_away_declared_or_not(engine: Engine) -> None:
    with running(engine, max_body=200) as address:
        url = f"{address}/v1/completions"
        assert httpx.post(url, content=b"x" * 201).status_code == 413
        assert httpx.post(url, content=iter([b"x" * 150] * 2)).status_code == 413


# ---------------------------------------------------------------------- life


def test_a_client_that_goes_away_cancels_its_request(address: str) -> None:
    before = ended(address, "cancelled")
    body = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": 190,
        "ignore_eos": True,
    }
    with (
        httpx.Client() as http,
        http.stream("POST", f"{address}/v1/completions", json=body | {"stream": True}) as answer,
    ):
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json=body, timeout=0.1)
    deadline = time.monotonic() + 10
    while ended(address, "cancelled") < before + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(address, "cancelled") == before + 2
    assert metric(address, "expertflow_requests_active") == 0


def test_metrics_count_what_was_served(address: str, client: openai.OpenAI) -> None:
    names = ("expertflow_generated_tokens_total", "expertflow_request_seconds_count")
    before = [metric(address, name) for name in names]
    client.completions.create(
        model="tiny", prompt="a", max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert [metric(address, name) for name in names] == [before[0] + 5, before[1] + 1]
    assert metric(address, "expertflow_expert_bytes_total") > 0


def test_stopping_lets_a_running_request_finish(engine: Engine) -> None:
    said: list[Any] = []
    with running(engine, grace=20) as address:
        client = connect(address)
        asked: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 100}

        def ask() -> None:
            said.append(client.completions.create(**asked, extra_body={"ignore_eos": True}))

        asking = threading.Thread(target=ask)
        asking.start()
        while not metric(address, "expertflow_requests_active"):
            time.sleep(0.005)
    asking.join()
    assert said[0].usage.completion_tokens == 100


def test_stopping_cancels_what_outlasts_the_grace(engine: Engine) -> None:
    told: list[Any] = []
    with running(engine, grace=1, batch=1, rows=1) as address:
        prompts = ["a"] * 64  # one after the other, for longer than the grace
        asked = {"model": "tiny", "prompt": prompts, "max_tokens": 190, "ignore_eos": True}

        def ask() -> None:
            told.append(httpx.post(f"{address}/v1/completions", json=asked, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        while not metric(address, "expertflow_requests_active"):
            time.sleep(0.005)
    asking.join()
    assert told[0].status_code == 503
    assert told[0].json()["error"]["message"] == "the server is shutting down"


def metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def ended(address: str, finish: str) -> float:
    return metric(address, f'expertflow_requests_total{{finish="{finish}"}}')


# ---------------------------------------------------------------------- command line


def test_the_server_listens_to_this_machine_only_unless_told_otherwise() -> None:
    assert ServerSettings(model="m").host == "127.0.0.1"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"port": 70000}, "port=70000"), ({"max_queue": 0}, "max_queue=0"), ({"batch": 0}, "batch=0")],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerSettings(model="m", **options)


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        ServerSettings(model="m", token_file=file).read_token()
