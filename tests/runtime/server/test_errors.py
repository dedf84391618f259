"""Errors of the server: OpenAI's shape, a code, the parameter, for whatever is sent."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import time
from typing import Any

import httpx2 as httpx
import openai
import pytest

from runtime.engine.engine import Engine
from runtime.server.handlers import Handlers
from tests.helpers.http_server import connect, running

COMPLETIONS = "/v1/completions"
ASKED = {"model": "tiny", "prompt": "a", "max_tokens": 2}


def post(address: str, body: bytes, path: str = COMPLETIONS, **headers: str) -> httpx.Response:
    sent = {"content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return httpx.post(f"{address}{path}", content=body, headers=sent)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, which must have the shape that clients read."""
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] and error["code"]
    return error


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[1]", "no JSON object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "too large"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "nested"),
    ],
    ids=range(10),
)
def test_a_body_that_is_no_json_is_refused(address: str, body: bytes, told: str) -> None:
    for path in (COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = post(address, body, path)
        assert answer.status_code == 400
        assert told in error_of(answer)["message"]
        assert error_of(answer)["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a", "b\udfff"]}, "prompt"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"max_tokens": 10**400}, "prompt"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999999]}, "stop_token_ids"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a"] * 33}, "stop"),
        ({"stop": "a" * 1001}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"n": 10**30}, "n"),
        ({"n": 129}, "n"),
        ({"priority": 1}, "priority"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused_by_name(
    address: str, asked: dict[str, Any], param: str
) -> None:
    answer = post(address, json.dumps(ASKED | asked).encode())
    assert answer.status_code == 400, answer.text
    told = error_of(answer)
    assert told["param"] == param or str(told["param"]).startswith(param), told
    assert param in told["message"] or param in ("prompt", "n")


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError) as completion:
        client.completions.create(model="tiny", prompt="abc " * 100)
    assert (completion.value.code, completion.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as chat:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "abc " * 100}]
        )
    assert (chat.value.code, chat.value.param) == ("context_length_exceeded", "messages")


def test_other_kinds_of_content_are_refused(address: str) -> None:
    body = json.dumps(ASKED).encode()
    assert post(address, body, content_type="text/plain").status_code == 415
    zipped = post(address, gzip.compress(body), content_encoding="gzip")
    assert (zipped.status_code, error_of(zipped)["code"]) == (415, "unsupported_media_type")
    assert post(address, body, content_type="application/json; charset=utf-8").status_code == 200


def test_what_is_not_there_is_told_in_the_same_shape(address: str) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
    ):
        answer = httpx.request(method, f"{address}{path}")
        assert answer.status_code == status
        error_of(answer)
    assert httpx.get(f"{address}{COMPLETIONS}").headers["allow"] == "POST"
    for path in ("/health", "/ping", "/version", "/v1/models"):
        assert httpx.head(f"{address}{path}").status_code == 200
    assert httpx.head(f"{address}/nowhere").status_code == 404


def test_a_model_that_is_not_served_has_its_code(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.completions.create(model="gpt", prompt="a"),
        lambda: client.models.retrieve("gpt"),
        lambda: client.models.retrieve("org/gpt"),
    ):
        with pytest.raises(openai.NotFoundError) as missing:
            ask()
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_a_fault_of_the_server_is_its_own(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: Any) -> Any:
        raise KeyError("secret")

    with running(engine) as address, connect(address) as client:
        monkeypatch.setattr(Handlers, "_prepare", fail)
        with (
            caplog.at_level(logging.ERROR),
            pytest.raises(openai.InternalServerError) as told,
        ):
            client.completions.create(model="tiny", prompt="a")
        assert told.value.code == "internal_error"
        assert "secret" not in told.value.message
        assert told.value.request_id
        monkeypatch.undo()
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
    assert any(record.exc_info for record in caplog.records)


def test_a_stream_that_fails_midway_tells_and_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.server.protocol.completion_answer import CompletionAnswer

    pieces, seen = CompletionAnswer.pieces, []

    def fail(self: Any, index: int, item: Any) -> Any:
        seen.append(item)
        if len(seen) > 3:
            raise KeyError("secret")
        return pieces(self, index, item)

    with running(engine) as address, connect(address) as client:
        monkeypatch.setattr(CompletionAnswer, "pieces", fail)
        stream = client.completions.create(model="tiny", prompt="abc", max_tokens=50, stream=True)
        with pytest.raises(openai.APIError, match="the server failed to answer"):
            list(stream)


def test_every_answer_has_an_id(client: openai.OpenAI, address: str) -> None:
    raw = client.models.with_raw_response.list()
    assert raw.headers["x-request-id"]
    assert raw.parse().data[0].id == "tiny"
    assert httpx.get(f"{address}/nowhere").headers["x-request-id"]


def test_a_body_that_does_not_arrive_is_given_up(engine: Engine) -> None:
    with running(engine, body_timeout=0.3) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.settimeout(10)
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: 100\r\n\r\n{"
            )
            start = time.monotonic()
            assert b"408" in slow.recv(1000).splitlines()[0]
            assert time.monotonic() - start < 5
