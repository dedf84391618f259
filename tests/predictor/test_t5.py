"""The paper's predictor: its size, and the tokens that each prediction depends on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from predictor.networks.t5 import T5Predictor, T5Settings
from predictor.networks.windows import Predictions, PredictorShape, Windows
from predictor.training.module import RouteModule
from routing.predictor_file.format import HEADS, PADDING
from tests.helpers.predicting import (
    NUM_EXPERTS,
    NUM_LAYERS,
    TOPOLOGY,
    VOCAB_SIZE,
    random_windows,
    shape,
)

SMALL = T5Settings(width=16, mlp_width=32, blocks=2, attention_heads=2, head_width=8)
PROMPT, LENGTH = 5, 9


@pytest.fixture
def predictor() -> T5Predictor:
    built = SMALL.build(shape(window=32))
    with torch.no_grad():
        for parameter in built.parameters():  # large enough for every input to matter
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built.eval()


@pytest.fixture
def batch() -> Windows:
    return random_windows(1, LENGTH)._replace(prompt_lengths_B=torch.tensor([PROMPT]))


def reads(predictor: T5Predictor, batch: Windows) -> Tensor:
    """bool [T, T]: does the prediction at the first index depend on the token at the second?"""
    num_tokens = batch.token_ids_BT.shape[1]
    before, depends = logits(predictor(batch)), torch.zeros(num_tokens, num_tokens)
    for token in range(num_tokens):
        ids_BT = batch.token_ids_BT.clone()
        ids_BT[:, token] = (ids_BT[:, token] + 1) % VOCAB_SIZE
        after = logits(predictor(batch._replace(token_ids_BT=ids_BT)))
        depends[:, token] = (after - before).abs().amax((0, 2, 3))
    return depends > 1e-6


def logits(predictions: Predictions) -> Tensor:
    return torch.cat(predictions, dim=2).detach()


def test_it_has_the_papers_number_of_parameters() -> None:
    sizes = PredictorShape(
        num_layers=6, num_experts=32, top_k=1, vocab_size=32128, window=512, horizon=4
    )
    paper = T5Settings().build(sizes)
    heads = sum(p.numel() for p in paper.heads.parameters())
    # 7.21 MiB in bfloat16, the size that the paper states for T5's vocabulary
    assert sum(p.numel() for p in paper.parameters()) - heads == 3_782_144
    assert heads == len(HEADS) * 32 * 6 * 32  # no bias


def test_a_generated_token_reads_the_prompt_and_the_generated_tokens_before_it(predictor, batch):
    expected = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    expected[:, :PROMPT] = True  # through the encoder, which reads it in both directions
    expected[PROMPT:, PROMPT:] = torch.ones(LENGTH - PROMPT, LENGTH - PROMPT).tril().bool()
    assert torch.equal(reads(predictor, batch), expected)


def test_generated_tokens_do_not_read_the_decoders_prompt_segment(predictor, batch) -> None:
    """They are the paper's decoder: the same as when the decoder is fed generated tokens only."""
    x_BTD = predictor.embedding_VD(batch.token_ids_BT)
    encoded = predictor.encoder(inputs_embeds=x_BTD[:, :PROMPT]).last_hidden_state
    decoded = predictor.decoder(
        inputs_embeds=x_BTD[:, PROMPT:], encoder_hidden_states=encoded
    ).last_hidden_state
    alone, within = predictor.read_out(decoded), predictor(batch)
    torch.testing.assert_close(logits(alone), logits(within)[:, PROMPT:])


def test_without_a_prompt_it_is_a_causal_decoder_over_every_token(predictor, batch) -> None:
    empty = batch._replace(prompt_lengths_B=torch.tensor([0]))
    assert torch.equal(reads(predictor, empty), torch.ones(LENGTH, LENGTH).tril().bool())


def test_padding_on_the_left_changes_nothing(predictor, batch) -> None:
    padded = Windows(
        torch.nn.functional.pad(batch.token_ids_BT, (3, 0), value=7),
        batch.routes_BTLK,
        torch.nn.functional.pad(batch.positions_BT, (3, 0), value=PADDING),
        batch.experts_BTLK,
        batch.prompt_lengths_B + 3,
    )
    torch.testing.assert_close(logits(predictor(padded))[:, 3:], logits(predictor(batch)))


def test_documents_packed_into_one_row_do_not_read_each_other(predictor, batch) -> None:
    gap = torch.where(torch.arange(LENGTH) < 3, 0, predictor.shape.window + 1)
    packed = batch._replace(positions_BT=batch.positions_BT + gap)
    depends = reads(predictor, packed)
    assert not depends[:3, 3:].any()
    assert not depends[3:, :3].any()


def test_the_loss_is_on_generated_tokens_alone(batch) -> None:
    module = RouteModule(TOPOLOGY.to_json(), "decoder", 32, 3, SMALL).eval()
    other_BTLK = batch.experts_BTLK.clone()
    other_BTLK[:, : PROMPT - 3] = (other_BTLK[:, : PROMPT - 3] + 1) % NUM_EXPERTS
    predictions = module.predictor(batch)
    losses = module.losses(predictions, batch)
    torch.testing.assert_close(
        module.losses(predictions, batch._replace(experts_BTLK=other_BTLK)), losses
    )
    changed = batch._replace(experts_BTLK=(batch.experts_BTLK + 1) % NUM_EXPERTS)
    assert not torch.allclose(module.losses(predictions, changed), losses)


def test_it_learns_routes_that_follow_from_the_token() -> None:
    """In sixty steps: which experts a token of a small vocabulary uses, better than chance."""
    torch.manual_seed(0)
    settings = T5Settings(
        width=16, mlp_width=32, blocks=1, attention_heads=2, head_width=8, dropout=0.0
    )
    module = RouteModule(TOPOLOGY.to_json(), "decoder", 32, 3, settings)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    first = last = 0.0
    for step in range(60):
        batch = random_windows(8, 16)._replace(prompt_lengths_B=torch.full((8,), 4))
        ids_BT11 = batch.token_ids_BT[..., None, None] % NUM_EXPERTS
        experts = (ids_BT11 + torch.tensor([0, 3])).remainder(NUM_EXPERTS)
        batch = batch._replace(experts_BTLK=experts.expand(-1, -1, NUM_LAYERS, -1))
        loss = module.losses(module.predictor(batch), batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.5 * first
