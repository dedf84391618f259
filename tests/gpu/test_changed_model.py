"""On a GPU: changes to an offloaded model are exact or refused, also after steps were captured."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.offloaded import needs_gpu, offloaded, prompts
from tests.helpers.tiny import tiny_model
from tests.runtime.cuda.test_changed_model import CHANGES

pytestmark = [
    needs_gpu,
    pytest.mark.filterwarnings("ignore:decoding runs outside of CUDA graphs"),
]


def generate(model: Any) -> Tensor:
    inputs = {name: value.cuda() for name, value in prompts(2).items()}
    tokens: Tensor = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokens.cpu()


def stock() -> Any:
    return tiny_model("olmoe").cuda()


@pytest.mark.parametrize(
    ("change", "reason"), CHANGES, ids=[change.__name__ for change, _ in CHANGES]
)
def test_decoding_follows_a_change_made_after_steps_were_captured(
    change: Callable[[Any], None], reason: str
) -> None:
    with offloaded(tiny_model("olmoe")) as model:
        generate(model)
        assert model.expertflow.decode_path == "graph"
        other = stock()
        change(other)
        change(model)
        assert torch.equal(generate(model), generate(other))
        assert model.expertflow.decode_path == reason
        model.expertflow.check_integrity()


def test_a_weight_that_is_changed_in_place_is_read_by_captured_steps() -> None:
    with offloaded(tiny_model("olmoe")) as model:
        generate(model)
        other = stock()
        for one in (model, other):
            weights = {name: value for name, value in one.state_dict().items() if "q_proj" in name}
            one.load_state_dict({name: -value for name, value in weights.items()}, strict=False)
        assert torch.equal(generate(model), generate(other))
        assert model.expertflow.decode_path == "graph"


REFUSED: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "to the CPU": lambda model: model.cpu(),
    "half the decoder": lambda model: model.model.half(),
    "a deep copy": copy.deepcopy,
    "a saved state dict": lambda model: torch.save(model.state_dict(), io.BytesIO()),
    "a new expert": lambda model: setattr(
        model.model.layers[0].mlp.experts, "down_proj", nn.Parameter(torch.zeros(8, 32, 24))
    ),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_change_that_would_not_reach_the_experts_is_refused(
    change: Callable[[Any], Any],
) -> None:
    with offloaded(tiny_model("olmoe")) as model:
        before = generate(model)
        with pytest.raises(ValueError, match="offloaded"):
            change(model)
        assert model.cuda() is model and model.to("cuda", torch.float32) is model
        assert torch.equal(generate(model), before)
        assert list(model.state_dict()) == list(stock().state_dict())
        assert model.num_parameters() == stock().num_parameters()
