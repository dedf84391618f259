"""Step inputs: the tokens and positions of a step, from the arguments of the model's call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from routing.predictor_file.format import PADDING
from runtime.engine.step_inputs import StepInputs, read_inputs
from tests.helpers.tiny import tiny_model

TOKENS = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 4]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def read(*args: Any, kind: str = "olmoe", **kwargs: Any) -> StepInputs:
    return read_inputs(tiny_model(kind), args, kwargs)


def test_positions_count_real_tokens_only() -> None:
    inputs = read(input_ids=TOKENS, attention_mask=MASK)
    assert inputs.positions_BT.tolist() == [[0, 1, 2, 3], [PADDING, PADDING, 0, 1]]
    assert inputs.token_ids_BT is not None and inputs.token_ids_BT.tolist() == TOKENS.tolist()
    assert (inputs.past_length, inputs.num_tokens) == (0, 6)


def test_padding_at_the_right_is_padding_too() -> None:
    inputs = read(input_ids=TOKENS, attention_mask=MASK.flip(1))
    assert inputs.positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, PADDING, PADDING]]


def test_a_step_goes_on_where_its_sequence_ended() -> None:
    model: Any = tiny_model("olmoe")
    cache = DynamicCache(config=model.config)
    model(TOKENS, attention_mask=MASK, past_key_values=cache)
    mask = torch.cat([MASK, torch.ones(2, 1, dtype=torch.int64)], 1)
    step: dict[str, Any] = {"input_ids": TOKENS[:, -1:], "past_key_values": cache}
    inputs = read(attention_mask=mask, **step)
    assert inputs.positions_BT.tolist() == [[4], [2]]
    assert (inputs.past_length, inputs.num_tokens) == (4, 2)
    assert read(**step).positions_BT.tolist() == [[4], [4]], "without a mask nothing is padding"


@pytest.mark.parametrize("kind", ["olmoe", "switch_transformers"])
def test_arguments_by_position_are_arguments_by_name(kind: str) -> None:
    if kind == "olmoe":
        inputs = read(TOKENS, MASK)
    else:
        inputs = read(TOKENS[:, :1], None, TOKENS, MASK, kind=kind)
    assert inputs.positions_BT.tolist() == [[0, 1, 2, 3], [PADDING, PADDING, 0, 1]]


def test_embeddings_have_positions_but_no_token_ids() -> None:
    inputs = read(inputs_embeds=torch.zeros(2, 4, 32), attention_mask=MASK)
    assert inputs.token_ids_BT is None
    assert inputs.positions_BT.tolist() == [[0, 1, 2, 3], [PADDING, PADDING, 0, 1]]


def test_an_encoder_decoders_step_is_its_decoders() -> None:
    inputs = read(
        kind="switch_transformers",
        input_ids=TOKENS,
        attention_mask=MASK,
        decoder_input_ids=TOKENS[:, :2],
    )
    assert inputs.positions_BT.tolist() == [[0, 1], [0, 1]]
    assert inputs.num_tokens == 4
