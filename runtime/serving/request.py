"""A request, and what comes back: new text while it runs, and its result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

Finish = Literal["stop", "length", "cancelled", "error"]
Fault = Literal["", "request", "server"]

_numbers = itertools.count()


class Logprob(NamedTuple):
    """The log-probability of a token in the model's own distribution, before any sampling rule.

    Natural logarithms.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Token ids and log-probabilities of as many likeliest tokens as were asked for."""


class Delta(NamedTuple):
    """New text of a request, for its streaming callback."""

    id: str
    token_id: int
    text: str
    """May be empty: text that could become a stop string is held back."""
    logprob: Logprob | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue."""

    prompt: str | Sequence[int]
    """Text, or token ids."""
    max_tokens: int = 128
    """Tokens to generate at the most."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 takes all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this joint probability."""
    seed: int | None = None
    """Seed of the request's own random numbers: the same seed gives the same tokens, whatever runs
    beside it.
    """
    stop: str | Sequence[str] = ()
    """A stop string or several: generation ends before the first, which is no part of the text."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    logprobs: int | None = None
    """Report each token's log-probability and those of so many likeliest tokens; None: neither."""
    priority: int = 0
    """A higher one is served first; the bound on waiting holds for all."""
    group: str = ""
    """Requests of one group share one turn, and a prompt that they have in common runs once: the
    choices of one answer, the requests of one client. Empty: a turn of its own.
    """
    label: str = ""
    """Domain, for the reference scheduler `domain-oracle`."""
    id: str = field(default_factory=lambda: f"request-{next(_numbers)}")
    """Unique among the requests in flight."""
    on_token: Callable[[Delta], None] | None = None
    """Called after each token, in the thread that runs the steps."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check_types()
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: generate at least 1 token")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} is not 0 or above")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; 0 takes all tokens")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs} is negative; 0 is the chosen token's alone")
        if any(not text for text in self.stop):
            raise ValueError("an empty stop string would end every request at once")

    def _check_types(self) -> None:
        """Raise ValueError for a field that is no number or no text where it should be one."""
        if not isinstance(self.stop, list | tuple) or not all(
            isinstance(text, str) for text in self.stop
        ):
            raise ValueError(f"stop={self.stop!r} is neither text nor a list of texts")
        for name in ("max_tokens", "top_k", "seed", "logprobs", "priority"):
            value: Any = getattr(self, name)
            optional = value is None and name in ("seed", "logprobs")
            if not optional and (type(value) is bool or not isinstance(value, Integral)):
                raise ValueError(f"{name}={value!r} is not a whole number")
        if not isinstance(self.group, str):
            raise ValueError(f"group={self.group!r} is not text")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if type(value) is bool or not isinstance(value, Real):
                raise ValueError(f"{name}={value!r} is not a number")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of a request. Times are `time.perf_counter` seconds, NaN for what never happened."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    """Generated, with the end-of-sequence token or the stop string's tokens."""
    num_prompt: int
    finish: Finish
    logprobs: tuple[Logprob, ...] = ()
    """One for each of `token_ids`, where the request asks for them."""
    error: str = ""
    """The reason, where `finish` is "error", or "cancelled" by the server."""
    fault: Fault = ""
    """Where `finish` is "error": of the request, which would fail again, or of the server."""
    arrived: float = float("nan")
    first_token: float = float("nan")
    finished: float = float("nan")
