"""A request, and what comes back: new text while it runs, and its result."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from runtime.serving.inputs import fields
from runtime.serving.inputs.prompt import ENCODING, IDS, as_prompt

Finish = Literal["stop", "length", "cancelled", "error"]

_numbers = itertools.count()


def next_id() -> str:
    """An id that no request has."""
    return f"request-{next(_numbers)}"


class Logprob(NamedTuple):
    """The log-probability of a token in the model's own distribution, before any sampling rule.

    Natural logarithms.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Token ids and log-probabilities of as many likeliest tokens as were asked for, and of the
    token itself where it is none of them and any were asked for.
    """


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
    """Text, or token ids: a list, a tensor or a tokenizer's output of one row."""
    max_tokens: int = 128
    """Tokens to generate at the most; 0 with `prompt_logprobs` only."""
    min_tokens: int = 0
    """Tokens to generate before the end-of-sequence token, one of `stop_token_ids` or a stop string
    may end the request.
    """
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 takes all, and so does -1."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this joint probability."""
    min_p: float = 0.0
    """Sample among tokens of at least this share of the likeliest one's probability."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that was generated, -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for each time that it was generated, -2 to 2."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and of the text less likely: divides logits above 0, multiplies
    those below; 1 is none.
    """
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of tokens by their ids, -100 to 100."""
    seed: int | None = None
    """Seed of the request's own random numbers: the same seed gives the same tokens, whatever runs
    beside it.
    """
    stop: str | Sequence[str] | None = ()
    """A stop string or several: generation ends with the first, which is no part of the text."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the request; their text is no part of the text."""
    include_stop_str_in_output: bool = False
    """Let the text end with the stop string, or with the text of the stop token."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    logprobs: int | None = None
    """Report each token's log-probability and those of so many likeliest tokens; None: neither."""
    prompt_logprobs: int | None = None
    """Report the same of the prompt's tokens, each after those before it."""
    json_schema: Mapping[str, Any] | bool | None = field(default=None, hash=False)
    """The text is JSON that fits this schema, of which the model's choices fill the freedom; True:
    any JSON object. The request ends with the JSON's end.
    """
    priority: int = 0
    """A higher one is served first; the bound on waiting holds for all."""
    label: str = ""
    """Domain, for the reference scheduler `domain-oracle`."""
    id: str = field(default_factory=next_id)
    """Unique among the requests in flight."""
    on_token: Callable[[Delta], None] | None = None
    """Called after each token, in the thread that runs the steps."""

    @classmethod
    def of(cls, item: Any) -> Self:
        """A request out of one, of a mapping of its fields, or of a prompt alone.

        Raises ValueError.
        """
        if isinstance(item, cls):
            return item
        if not isinstance(item, Mapping):
            if item is None or isinstance(item, int | float):
                raise ValueError(
                    f"{fields.shown(item)} is no request: give a Request, a dict of its fields or "
                    "a prompt"
                )
            return cls(prompt=item)
        given = {key: value for key, value in item.items() if key not in ENCODING}
        if IDS in item:
            given["prompt"] = {key: item[key] for key in ENCODING if key in item}
        known = [one.name for one in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{fields.shown(name)} is no field of a request{hint}")
        if "prompt" not in given:
            raise ValueError(f"a request of {', '.join(given) or 'nothing'} has no prompt")
        return cls(**given)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", as_prompt(self.prompt))
        for name in fields.KINDS:
            object.__setattr__(self, name, fields.normalized(name, getattr(self, name)))
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_tokens=0: generate at least 1 token, or ask for prompt_logprobs")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        if self.json_schema is not None and self.min_tokens:
            raise ValueError("min_tokens does not go with json_schema, which says where to end")
        if not (self.on_token is None or callable(self.on_token)):
            raise ValueError(f"on_token={fields.shown(self.on_token)} cannot be called")


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
    prompt_logprobs: tuple[Logprob | None, ...] = ()
    """One for each token of the prompt, where the request asks for them; None for the first."""
    error: str = ""
    """The reason, where `finish` is "error"."""
    arrived: float = float("nan")
    first_token: float = float("nan")
    finished: float = float("nan")

    @classmethod
    def refusing(cls, request: Any, error: Exception) -> Self:
        """The end of a request that could not be taken in, or of what makes no request."""
        given = request.get("id") if isinstance(request, Mapping) else getattr(request, "id", None)
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        now = time.perf_counter()
        return cls(
            id=given if isinstance(given, str) else next_id(), text="", token_ids=(), num_prompt=0,
            finish="error", error=reason, arrived=now, finished=now,
        )  # fmt: skip
