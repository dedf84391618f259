"""Fields of a request, brought into one form: numbers of any library become Python's own.

What is of the wrong kind or out of range is a ValueError that names the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

MOST_BIAS = 100.0


def shown(value: Any) -> str:
    """A value as it is written, in short; its type where it cannot be written."""
    try:
        return f"{value!r:.60}"
    except Exception:  # too many digits, a list within itself, a class of the caller's
        return f"of type {type(value).__name__}"


def plain(value: Any) -> Any:
    """A NumPy or torch scalar as Python's number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def whole(name: str, value: Any) -> int:
    """`value` as an int. Raises ValueError for fractions, flags and text."""
    value = plain(value)
    if type(value) is bool or not isinstance(value, Integral):
        raise ValueError(f"{name}={shown(value)} is not a whole number")
    return int(value)


def number(name: str, value: Any) -> float:
    """`value` as a finite float."""
    value = plain(value)
    if type(value) is bool or not isinstance(value, Real):
        raise ValueError(f"{name}={shown(value)} is not a number")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted):
        raise ValueError(f"{name}={shown(value)} is not a finite number")
    return converted


def flag(name: str, value: Any) -> bool:
    """`value` as a bool; 0, 1 and "no" are none."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} is neither True nor False")
    return value


def text(name: str, value: Any) -> str:
    """`value`, which has to be text."""
    if not isinstance(value, str):
        raise ValueError(f"{name}={shown(value)} is not text")
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Stop strings: one by itself, several, or none."""
    given = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"{name}={shown(value)} is neither text nor a list of texts")
    if not all(given):
        raise ValueError("an empty stop string would end every request at once")
    for one in given:
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}={shown(one)} is no valid text: no output can hold it"
            ) from error
    return tuple(given)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids: a list, a tuple, a set, an array, or none."""
    if value is None:
        return ()
    given = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{name}={shown(value)} is not a list of token ids")
    ids = tuple(whole(name, one) for one in given)
    if any(one < 0 for one in ids):
        raise ValueError(f"{name}={shown(value)} has a negative token id")
    return ids


def bias(name: str, value: Any) -> dict[int, float]:
    """Token ids and what is added to their logits. JSON's keys, which are text, will do."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={shown(value)} is not a mapping from token ids to numbers")
    found: dict[int, float] = {}
    for key, added in value.items():
        is_id = isinstance(key, str) and key.isascii() and key.isdigit()
        token_id = int(key) if is_id else whole(f"{name}, token id", key)
        if token_id < 0 or token_id in found:
            raise ValueError(
                f"{name} has the token id {shown(key)}, which is negative or given twice"
            )
        found[token_id] = number(f"{name}[{token_id}]", added)
        if abs(found[token_id]) > MOST_BIAS:
            raise ValueError(f"{name}[{token_id}]={shown(added)} is not in [-100, 100]")
    return found


def schema(name: str, value: Any) -> Any:
    """A JSON schema as a dict; True for any JSON object; None for free text."""
    value = plain(value)
    if value is None or value is False:
        return None
    if value is not True and not isinstance(value, Mapping):
        raise ValueError(
            f"{name}={shown(value)} is neither a JSON schema as a mapping nor True; "
            "json.loads makes a mapping of text"
        )
    try:
        return value if value is True else json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


class Range(NamedTuple):
    """Numbers that a field takes."""

    low: float
    high: float
    complaint: str
    takes_low: bool = True

    def check(self, name: str, value: float) -> None:
        above = value >= self.low if self.takes_low else value > self.low
        if not (above and value <= self.high):
            raise ValueError(f"{name}={shown(value)} {self.complaint}")


ALL = -1
"""What other engines write for `top_k` where all tokens are meant."""

PENALTY = Range(-2.0, 2.0, "is not in [-2, 2]")
RANGES = {
    "max_tokens": Range(0, math.inf, "is negative"),
    "min_tokens": Range(0, math.inf, "is negative; 0 is no minimum"),
    "temperature": Range(0.0, math.inf, "is not 0 or above"),
    "top_p": Range(0.0, 1.0, "is not in (0, 1]", takes_low=False),
    "top_k": Range(0, math.inf, "is negative; 0 takes all tokens"),
    "min_p": Range(0.0, 1.0, "is not in [0, 1]"),
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "repetition_penalty": Range(0.0, math.inf, "is not above 0; 1 is none", takes_low=False),
    "logprobs": Range(0, math.inf, "is negative; 0 is the chosen token's alone"),
    "prompt_logprobs": Range(0, math.inf, "is negative; 0 is the prompt's own tokens alone"),
}

KINDS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": whole,
    "min_tokens": whole,
    "temperature": number,
    "top_k": whole,
    "top_p": number,
    "min_p": number,
    "presence_penalty": number,
    "frequency_penalty": number,
    "repetition_penalty": number,
    "logit_bias": bias,
    "seed": whole,
    "stop": texts,
    "stop_token_ids": token_ids,
    "include_stop_str_in_output": flag,
    "ignore_eos": flag,
    "logprobs": whole,
    "prompt_logprobs": whole,
    "json_schema": schema,
    "priority": whole,
    "label": text,
    "id": text,
}
OPTIONAL = ("seed", "logprobs", "prompt_logprobs")


def normalized(name: str, value: Any) -> Any:
    """The value of field `name` in its one form. Raises ValueError."""
    if value is None and name in OPTIONAL:
        return None
    value = KINDS[name](name, value)
    if name == "top_k" and value == ALL:
        return 0
    if name in RANGES:
        RANGES[name].check(name, value)
    return value
