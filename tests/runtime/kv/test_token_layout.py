"""Attention of a step's sequences: prompts together and each by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from runtime.kv.token_layout import Span, TokenLayout

ROWS, HEADS, CONTEXT, WIDTH = 9, 4, 24, 8
MODULE: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
CPU = torch.device("cpu")


def attend(spans: list[Span], kinds: dict[str, Any], *, alone: bool, calls: list[int]) -> Tensor:
    """The output for queries that are the same for a sequence whoever shares its step."""

    def function(module: Any, query: Tensor, *given: Any, **options: Any) -> Any:
        calls.append(len(query))
        return sdpa_attention_forward(module, query, *given, **options)

    if alone:
        outputs = [attend([span], kinds, alone=False, calls=calls) for span in spans]
        return torch.cat(outputs, 1)
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, ROWS, 2, CONTEXT, WIDTH, generator=random)
    for span in spans:
        keys[span.row, :, span.start + span.num_tokens :] = torch.nan
    queries = torch.randn(ROWS, CONTEXT, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    parts = [queries[span.row, : span.num_tokens] for span in spans]
    query = torch.cat(parts)[None].transpose(1, 2)
    return TokenLayout(spans, CPU).attend(function, MODULE, query, keys, values, **kinds)


@pytest.mark.parametrize("kinds", [{}, {"sliding_window": 3}, {"chunk": 4}])
def test_prompts_of_about_one_length_attend_together_as_each_does_alone(
    kinds: dict[str, Any],
) -> None:
    lengths = [5, 1, 9, 2, 4, 17, 8, 3]
    spans = [Span(row, 0, length) for row, length in enumerate(lengths)]
    together: list[int] = []
    expected = attend(spans, kinds, alone=True, calls=[])
    found = attend(spans, kinds, alone=False, calls=together)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert together == [2, 3, 2, 1]


def test_sequences_that_go_on_attend_by_themselves() -> None:
    spans = [Span(0, 0, 5), Span(1, 3, 4), Span(2, 0, 6)]
    calls: list[int] = []
    found = attend(spans, {}, alone=False, calls=calls)
    assert calls == [1, 1, 1]
    torch.testing.assert_close(found, attend(spans, {}, alone=True, calls=[]))
