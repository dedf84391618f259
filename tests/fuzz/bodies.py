"""Random request bodies: mistakes that clients make, and what only an attacker sends."""

from __future__ import annotations

import json
from random import Random
from typing import Any, NamedTuple

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 4,
    "temperature": 0.8,
    "seed": 3,
}
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "min_p", "n", "best_of", "stop", "stop_token_ids", "stream", "stream_options", "seed",
    "logprobs", "top_logprobs", "prompt_logprobs", "echo", "suffix", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens", "ignore_eos", "priority",
    "user", "response_format", "tools", "tool_choice", "metadata", "store", "unheard_of",
)  # fmt: skip
ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


class Sent(NamedTuple):
    """One HTTP request."""

    path: str
    body: bytes
    content_type: str = "application/json"
    method: str = "POST"


def nasty(random: Random, depth: int = 0) -> Any:
    """A value that few fields expect."""
    simple = (
        None, True, False, 0, -1, 1, 2, 3, 7, 0.0, -0.0, 0.5, 1e-40, 1e40, 2**31, 2**63, 2**70,
        -(2**70), float("nan"), float("inf"), float("-inf"), "", " ", "a", "the", "null", "1",
        "0.5", "ä😀",
        "\ud800", "\udfff\ud800", "\u0000", "\ufeff", "<eos>", "a" * 3000, "٣", "tiny", "auto",
    )  # fmt: skip
    kind = random.random()
    if depth > 2 or kind < 0.65:
        return random.choice(simple)
    if kind < 0.8:
        return [nasty(random, depth + 1) for _ in range(random.choice((0, 1, 2, 5, 70)))]
    keys = ("type", "role", "content", "text", "function", "name", "json_schema", "schema", "5", "")
    return {random.choice(keys): nasty(random, depth + 1) for _ in range(random.choice((0, 1, 3)))}


def mutated(random: Random, path: str) -> dict[str, Any]:
    """A valid body with up to three fields changed, added or taken away."""
    body: dict[str, Any] = json.loads(json.dumps(CHAT if "chat" in path else COMPLETION))
    for _ in range(random.choice((1, 1, 2, 3))):
        if random.random() < 0.1:
            body.pop(random.choice(list(body)), None)
        else:
            body[random.choice(FIELDS)] = nasty(random)
    if random.random() < 0.2:
        body["stream"] = True
    return body


def broken(random: Random, text: bytes) -> bytes:
    """A body whose bytes are not JSON, or JSON that is hard to read."""
    place = random.randrange(len(text))
    return random.choice(
        (
            text[:place],
            text[:place] + bytes([random.randrange(256)]) + text[place + 1 :],
            text + text,
            b"",
            b"\xef\xbb\xbf" + text,
            b"[" * 20_000,
            b'{"model": "tiny", "prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
            b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5_000 + b"}",
            b'{"model": "tiny", "prompt": "a", "temperature": 1' + b"0" * 400 + b"}",
            b'{"model": "tiny", "prompt": "a", "prompt": [7], "max_tokens": 2}',
            b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 2}',
            b"null",
            b"[]",
            b'"text"',
            b"model=tiny&prompt=abc",
            bytes(random.randrange(256) for _ in range(64)),
        )
    )


def random_request(random: Random) -> Sent:
    """A request that is probably bad."""
    path = random.choice(ROUTES[:2] * 5 + ROUTES[2:])
    body = json.dumps(mutated(random, path)).encode()
    kind = random.random()
    if kind < 0.25:
        return Sent(path, broken(random, body))
    if kind < 0.28:
        return Sent(path, body, random.choice(("text/plain", "", "multipart/form-data", "x")))
    if kind < 0.31:
        return Sent(path, body, method=random.choice(("GET", "PUT", "DELETE", "PATCH", "HEAD")))
    if kind < 0.34:
        return Sent(random.choice(("/", "/v1", "/v1/models/none", "/v1/embeddings", "//")), body)
    return Sent(path, body)
