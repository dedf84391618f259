"""The tokenizer over HTTP, the list of models, the version."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import openai
import pytest

from runtime.engine.engine import Engine
from tests.helpers.http_server import connect, running
from tests.helpers.tiny import tiny_tokenizer

HI = [{"role": "user", "content": "hi"}]


def post(address: str, path: str, **body: Any) -> Any:
    return httpx.post(f"{address}{path}", json=body).json()


def test_text_becomes_tokens_and_tokens_text(address: str) -> None:
    told = post(address, "/tokenize", prompt="héllo", model="tiny", return_token_strs=True)
    ids = tiny_tokenizer()("héllo").input_ids
    assert told["tokens"] == ids and told["count"] == len(ids) and told["max_model_len"] == 200
    assert told["token_strs"] == tiny_tokenizer().convert_ids_to_tokens(ids)
    assert post(address, "/tokenize", prompt="a", add_special_tokens=False)["token_strs"] is None
    assert post(address, "/detokenize", tokens=ids) == {"prompt": "héllo"}
    assert post(address, "/detokenize", tokens=[]) == {"prompt": ""}


def test_messages_become_the_tokens_that_a_chat_counts(address: str, client: openai.OpenAI) -> None:
    told = post(address, "/tokenize", messages=HI)
    assert told["tokens"] == tiny_tokenizer()("user: hi\nassistant:").input_ids
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=1
    )
    assert said.usage is not None and said.usage.prompt_tokens == told["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 7}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, "model"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_what_has_no_tokens_is_refused(
    address: str, path: str, body: dict[str, Any], param: str
) -> None:
    assert post(address, path, **body)["error"]["param"].startswith(param)


def test_models_may_have_slashes_in_their_names(engine: Engine) -> None:
    with running(engine, name="org/tiny-7b") as address, connect(address) as client:
        (listed,) = client.models.list().data
        found = client.models.retrieve("org/tiny-7b")
        assert found == listed and found.id == "org/tiny-7b"
        assert found.to_dict()["max_model_len"] == 200
        assert httpx.get(f"{address}/v1/models/org/tiny-7b").json()["id"] == "org/tiny-7b"


def test_the_routes_are_documented(address: str) -> None:
    assert "/v1/chat/completions" in httpx.get(f"{address}/openapi.json").json()["paths"]


def test_the_version_is_told(address: str) -> None:
    assert httpx.get(f"{address}/version").json().keys() == {"version"}
