"""Requests as callers give them: several in an iterable, or one by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from runtime.serving.inputs.fields import shown
from runtime.serving.inputs.prompt import IDS, encoded_rows
from runtime.serving.request import Request


def items_of(requests: Any) -> Iterable[Any]:
    """Each item for `Request.of`. Text, a request or its fields by itself is one item; a
    tokenizer's output one for each of its rows.

    Raises ValueError for what holds no requests.
    """
    if isinstance(requests, Mapping) and IDS in requests:
        return list(encoded_rows(requests))
    if isinstance(requests, str | Request | Mapping):
        return [requests]
    if hasattr(requests, "tolist"):
        if getattr(requests, "ndim", 0) > 1 and len(requests) > 1:
            raise ValueError(
                "a tensor of several rows does not say where their padding is: give the "
                "tokenizer's whole output, or a list of lists of token ids"
            )
        return [requests]
    if isinstance(requests, bytes | bytearray) or not isinstance(requests, Iterable):
        raise ValueError(
            f"{shown(requests)} holds no requests: give an iterable of Request, of dicts of its "
            "fields or of prompts, or a queue"
        )
    return requests
