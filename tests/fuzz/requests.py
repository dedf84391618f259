"""Bad requests in flight beside good ones: everyone gets an answer, and the good ones theirs."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx2 as httpx

from tests.fuzz.bodies import CHAT, COMPLETION, Sent, random_request

PATIENCE = 60.0
"""Seconds after which an answer counts as a hang."""
GOOD: tuple[Sent, ...] = (
    Sent("/v1/completions", json.dumps(COMPLETION | {"max_tokens": 9, "logprobs": 2}).encode()),
    Sent("/v1/completions", json.dumps(COMPLETION | {"prompt": [9, 8, 7], "seed": 1}).encode()),
    Sent("/v1/completions", json.dumps(COMPLETION | {"temperature": 1, "seed": 5}).encode()),
    Sent("/v1/chat/completions", json.dumps(CHAT | {"n": 2, "max_tokens": 7}).encode()),
)


@dataclass
class Findings:
    """Outcomes of a run; empty lists are a pass."""

    statuses: Counter[int] = field(default_factory=Counter)
    good: int = 0
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    """Answers that are neither a result nor an error in OpenAI's shape, and server errors."""
    harmed: list[str] = field(default_factory=list)
    """Good requests whose answer was another one than alone."""

    def problems(self) -> dict[str, list[str]]:
        names = ("tracebacks", "hangs", "misshapen", "harmed")
        return {name: found for name in names if (found := getattr(self, name))}


class _Errors(logging.Handler):
    """Collects what the server logs at level ERROR."""

    def __init__(self, findings: Findings) -> None:
        super().__init__(logging.ERROR)
        self._findings = findings

    def emit(self, record: logging.LogRecord) -> None:
        self._findings.tracebacks.append(self.format(record)[-600:])


async def fuzz(address: str, num_requests: int, seed: int = 0, together: int = 8) -> Findings:
    """Send `num_requests` random requests, every fourth time beside a good one."""
    findings, random = Findings(), Random(seed)
    handler = _Errors(findings)
    logging.getLogger().addHandler(handler)
    try:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:
            expected = [answer_of(await _send(client, good)) for good in GOOD]
            turns = asyncio.Semaphore(together)
            tasks = []
            for number in range(num_requests):
                tasks.append(_bad(client, random_request(random), turns, findings))
                if number % 4 == 0:
                    which = number // 4 % len(GOOD)
                    tasks.append(_good(client, GOOD[which], expected[which], turns, findings))
            await asyncio.gather(*tasks)
            assert (await client.get("/health")).status_code == 200
    finally:
        logging.getLogger().removeHandler(handler)
    return findings


async def _send(client: Any, sent: Sent) -> Any:
    headers = {"content-type": sent.content_type} if sent.content_type else {}
    return await client.request(sent.method, sent.path, content=sent.body, headers=headers)


async def _bad(client: Any, sent: Sent, turns: asyncio.Semaphore, findings: Findings) -> None:
    async with turns:
        try:
            response = await _send(client, sent)
        except httpx.TimeoutException:
            findings.hangs.append(repr(sent)[:400])
            return
        except httpx.HTTPError as error:
            findings.misshapen.append(f"{type(error).__name__} after {sent!r:.400}")
            return
    findings.statuses[response.status_code] += 1
    if complaint := complaint_about(response, sent):
        findings.misshapen.append(f"{complaint}: {sent!r:.400} -> {response.text:.300}")


async def _good(
    client: Any, sent: Sent, expected: Any, turns: asyncio.Semaphore, findings: Findings
) -> None:
    async with turns:
        for _ in range(200):  # a full queue is an honest answer
            try:
                response = await _send(client, sent)
            except httpx.TimeoutException:
                findings.hangs.append(f"good: {sent!r:.300}")
                return
            if response.status_code != 429:
                break
            await asyncio.sleep(0.2)
    findings.good += 1
    if response.status_code != 200 or not same(answer_of(response), expected):
        findings.harmed.append(f"{sent!r:.300} -> {response.text:.300}")


def answer_of(response: Any) -> Any:
    """The choices and usage of an answer."""
    said = response.json()
    return said.get("choices"), said.get("usage")


def same(found: Any, expected: Any) -> bool:
    """True where two answers agree: log-probabilities to rounding, all else exactly."""
    if isinstance(expected, float):
        return isinstance(found, float) and math.isclose(found, expected, abs_tol=1e-4)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def complaint_about(response: Any, sent: Sent) -> str:
    """A fault of an answer's form, or nothing."""
    status = response.status_code
    if status >= 500:
        return f"a server error, {status}"
    if sent.method == "HEAD":
        return ""
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return _complaint_about_events(response.text)
    try:
        said = json.loads(response.text, parse_constant=_refuse_constant)
    except ValueError:
        return "no JSON" if status != 200 or sent.path.startswith("/v1") else ""
    if status == 200:
        return ""
    shape = said.get("error") if isinstance(said, dict) else None
    if not isinstance(shape, dict) or {"message", "type", "param", "code"} - shape.keys():
        return "no error in OpenAI's shape"
    return "" if shape["message"] else "an error without a message"


def _complaint_about_events(text: str) -> str:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    if not events:
        return "an empty stream"
    try:
        said = [json.loads(event) for event in events if event != "[DONE]"]
    except ValueError:
        return "an event that is no JSON"
    if events[-1] != "[DONE]" and "error" not in said[-1]:
        return "a stream that just ends"
    return ""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
