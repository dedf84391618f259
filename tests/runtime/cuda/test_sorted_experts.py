"""Experts of JetMoE's attention in captured steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.cuda.sorted_experts import replaced, sorted_forwards
from tests.helpers.architectures import architecture_model


@pytest.fixture
def model() -> Any:
    return architecture_model("jetmoe")


@pytest.fixture
def attention(model: Any) -> Iterator[Any]:
    """Experts of the first layer's attention."""
    with torch.no_grad():
        yield model.model.layers[0].self_attention.experts


@pytest.mark.parametrize("batch", [1, 4])
def test_they_give_what_the_models_own_give(model: Any, attention: Any, batch: int) -> None:
    hidden_B1H = torch.randn(batch, 1, 32, generator=torch.Generator().manual_seed(0))
    queries, logits, topology = attention.map(hidden_B1H)
    output = attention.reduce(queries, topology)
    with replaced(sorted_forwards(model)):
        found, found_logits, topology = attention.map(hidden_B1H)
        torch.testing.assert_close(found, queries)
        torch.testing.assert_close(found_logits, logits)
        torch.testing.assert_close(attention.reduce(found, topology), output)


def test_nothing_waits_for_a_number(model: Any, attention: Any) -> None:
    """On meta tensors, which have none."""
    hidden_B1H = torch.empty(4, 1, 32, device="meta")
    model.to("meta")
    with pytest.raises(NotImplementedError):
        attention.map(hidden_B1H)
    with replaced(sorted_forwards(model)):
        queries, _, topology = attention.map(hidden_B1H)
        output: Tensor = attention.reduce(queries, topology)
    assert output.shape == hidden_B1H.shape


def test_modules_have_their_own_forward_again_afterwards(model: Any) -> None:
    forwards = sorted_forwards(model)
    assert forwards
    with replaced(forwards), replaced(forwards):
        pass
    assert not any("forward" in module.__dict__ for module, _ in forwards)


def test_other_models_have_none() -> None:
    assert not sorted_forwards(architecture_model("olmoe"))
