"""The JSON body of a request: one object of what JSON allows, or a refusal with the reason."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import Request

from runtime.server.errors import Refused

DEEPEST = 64
"""Levels of nesting at the most: what handles a body recurses."""


async def read_json(http: Request) -> dict[str, Any]:
    """The object in the body. Raises Refused."""
    kind = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise Refused(415, f"Content-Type is {kind!r:.80}: send application/json")
    encoding = http.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Refused(415, f"Content-Encoding is {encoding!r:.80}: send the body as it is")
    return parse(await http.body())


def parse(body: bytes) -> dict[str, Any]:
    """The object that `body` is the JSON of. Raises Refused."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8: {error}", code="invalid_json") from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {error!s:.200}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refused(400, "the body is no JSON object", code="invalid_json")
    _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        _check_texts(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits:.40} is too large a number")
    return value


def _too_deep() -> Refused:
    return Refused(400, f"the body is nested more than {DEEPEST} levels deep", code="invalid_json")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _check_texts(value: dict[str, Any]) -> None:
    """Raise Refused for half a surrogate pair, which no tokenizer can encode."""
    for name, inner in value.items():
        try:
            json.dumps([name, inner], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            shown = name.encode("ascii", "backslashreplace").decode()
            raise Refused(
                400, f"{shown} holds half a surrogate pair, which is no text", param=shown
            ) from error
